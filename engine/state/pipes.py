"""A write to a pipe or terminal whose reader may be gone, which is no reason to end the host program.

Python ignores SIGPIPE where it is the program itself. Where it is embedded it does not, and a host program may have set
it back, as command-line tools do: then a write that nobody reads kills. A socket is spared that by MSG_NOSIGNAL.
"""

import os
import signal

_BROKEN = {signal.SIGPIPE}


def write_to_pipe(descriptor: int, data: bytes) -> int:
    """Write as os.write does, and return how many bytes. Raises BrokenPipeError where nobody reads, OSError.

    The kernel sends the signal to the thread that writes (signal(7)), so that is where it is kept out.
    """
    is_let_in = signal.SIGPIPE not in signal.pthread_sigmask(signal.SIG_BLOCK, ())
    is_pending = signal.SIGPIPE in signal.sigpending()
    try:
        if is_let_in:
            signal.pthread_sigmask(signal.SIG_BLOCK, _BROKEN)
        return os.write(descriptor, data)
    except BrokenPipeError:
        if is_let_in and not is_pending:
            signal.sigtimedwait(_BROKEN, 0)
        raise
    finally:
        if is_let_in:
            signal.pthread_sigmask(signal.SIG_UNBLOCK, _BROKEN)
