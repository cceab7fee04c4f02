"""Training: losses, optimiser and schedules, the step, the loop, checkpoints and logs.

Nothing is imported here, so that `bitnet_jax.training.report` costs no JAX. What others use:

    run.train_run          a whole run from its configuration alone: corpus, tokens, training, evaluation
    loop.train             a whole run in a folder, resumed if it was begun
    step.train_step        one update as a pure function; step.compile_step compiles it
    optimizer.make_optimizer, schedules.learning_rate, schedules.weight_decay
    losses.loss_sums       cross entropy and z-loss as sums
    codes                  ternary statistics and flips
    checkpoints            Checkpoints for the run that writes, read_params for everybody else
    run_directory          names of the files of a run
    logs.read              the lines of a metrics.jsonl
    report                 progress bar, plain lines, or warnings only
"""
