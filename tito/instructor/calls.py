"""A filter for the system calls of a submission (seccomp): what no lesson needs, and what Landlock does not see.

Refused: sockets (Landlock knows only TCP), io_uring (which opens them by itself), what outlives a process (System V
memory, message queues, keys), and the ways into another process, namespace or the kernel. Pretended, so that
`shutil.copy` still works: changes of mode, owner, times and attributes, which would reach any file of the user.
"""

from __future__ import annotations

import errno
import functools
import platform
import struct

_MACHINES = {"x86_64": (0, 0xC000003E), "aarch64": (1, 0xC00000B7)}  # column below, AUDIT_ARCH of linux/audit.h

# Name -> number on x86_64, on aarch64 (None: not there)
_REFUSED = {
    "socket": (41, 198), "io_uring_setup": (425, 425),
    "shmget": (29, 194), "semget": (64, 190), "msgget": (68, 186), "mq_open": (240, 180),
    "add_key": (248, 217), "request_key": (249, 218), "keyctl": (250, 219),
    "ptrace": (101, 117), "process_vm_readv": (310, 270), "process_vm_writev": (311, 271), "pidfd_getfd": (438, 438),
    "process_madvise": (440, 440), "migrate_pages": (256, 238), "move_pages": (279, 239),
    "setpriority": (141, 140), "ioprio_set": (251, 30), "sched_setparam": (142, 118), "sched_setscheduler": (144, 119),
    "sched_setattr": (314, 274), "sched_setaffinity": (203, 122),
    "unshare": (272, 97), "setns": (308, 268), "mount": (165, 40), "bpf": (321, 280), "perf_event_open": (298, 241),
    "userfaultfd": (323, 282),
}  # fmt: skip
_PRETENDED = {
    "chmod": (90, None), "fchmod": (91, 52), "fchmodat": (268, 53), "fchmodat2": (452, 452),
    "chown": (92, None), "lchown": (94, None), "fchown": (93, 55), "fchownat": (260, 54),
    "utime": (132, None), "utimes": (235, None), "futimesat": (261, None), "utimensat": (280, 88),
    "setxattr": (188, 5), "lsetxattr": (189, 6), "fsetxattr": (190, 7), "setxattrat": (463, 463),
    "removexattr": (197, 14), "lremovexattr": (198, 15), "fremovexattr": (199, 16), "removexattrat": (466, 466),
    "file_setattr": (469, 469),
}  # fmt: skip
_CLONE, _CLONE3, _PRLIMIT = (56, 220), (435, 435), (302, 261)
_NEW_USER = 0x10000000  # the flag of clone that makes a user namespace

# Instructions of classic BPF, answers of seccomp, and where its data holds the number, architecture and first argument
_LOAD, _IF_EQUAL, _IF_AT_LEAST, _IF_ANY_BIT, _ANSWER = 0x20, 0x15, 0x35, 0x45, 0x06
_ALLOW, _FAIL, _KILL = 0x7FFF0000, 0x00050000, 0x80000000
_NUMBER, _ARCHITECTURE, _ARGUMENT = 0, 4, 16


@functools.cache
def program() -> bytes:
    """The filter in BPF; empty on a machine whose numbers are not in the table."""
    if platform.machine() not in _MACHINES:
        return b""
    column, architecture = _MACHINES[platform.machine()]
    # Each line: instruction, operand, how many lines to skip if true, and if false.
    lines = [(_LOAD, _ARCHITECTURE, 0, 0), (_IF_EQUAL, architecture, 1, 0), (_ANSWER, _KILL, 0, 0)]
    lines += [(_LOAD, _NUMBER, 0, 0)]
    lines += [(_IF_AT_LEAST, 0x40000000, 0, 1), (_ANSWER, _FAIL | errno.EPERM, 0, 0)]  # x86_64 has a second set there
    # The flags of clone3 lie where a filter cannot look; without it the C library falls back to clone.
    lines += _when(_CLONE3[column], errno.ENOSYS)
    for table, answer in ((_REFUSED, errno.EPERM), (_PRETENDED, 0)):
        for numbers in table.values():
            if numbers[column] is not None:
                lines += _when(numbers[column], answer)
    for number, allowed in (
        (_CLONE[column], (_IF_ANY_BIT, _NEW_USER, 0, 1)),
        (_PRLIMIT[column], (_IF_EQUAL, 0, 1, 0)),  # its own limits, not another's
    ):
        lines += [(_IF_EQUAL, number, 0, 4), (_LOAD, _ARGUMENT, 0, 0), allowed]
        lines += [(_ANSWER, _FAIL | errno.EPERM, 0, 0), (_ANSWER, _ALLOW, 0, 0)]
    lines += [(_ANSWER, _ALLOW, 0, 0)]
    return b"".join(struct.pack("HBBI", what, true, false, operand) for what, operand, true, false in lines)


def _when(number: int, answer: int) -> list[tuple[int, int, int, int]]:
    """Call `number` fails with the error `answer`; 0 means that it does nothing and succeeds."""
    return [(_IF_EQUAL, number, 0, 1), (_ANSWER, _FAIL | answer, 0, 0)]
