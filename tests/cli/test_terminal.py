"""Control characters, and Ctrl-C that is only noted."""

import signal
import threading

import pytest

from bitnet_jax.cli.terminal import Interrupt, harmless


def test_every_control_character_but_newline_and_tab_is_replaced_and_nothing_else_is():
    for code in range(0x3000):
        char = chr(code)
        controls = code < 0x20 or 0x7F <= code < 0xA0
        if controls and char not in "\n\t":
            assert harmless(char).isprintable()
        else:
            assert harmless(char) == char
    assert harmless("\x1b]0;title\x07") == "␛]0;title␇"


def test_ctrl_c_is_noted_as_often_as_it_comes_and_works_again_behind():
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with Interrupt() as interrupt:
            assert not interrupt.noted
            signal.raise_signal(signal.SIGINT)
            signal.raise_signal(signal.SIGINT)
            assert interrupt.noted
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    finally:
        signal.signal(signal.SIGINT, before)


def test_a_thread_that_may_not_handle_signals_goes_without():
    found = []

    def enter():
        with Interrupt() as interrupt:
            found.append(interrupt.noted)

    thread = threading.Thread(target=enter)
    thread.start()
    thread.join()
    assert found == [False]
