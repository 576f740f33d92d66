"""The system calls that a judged program may not make, as the filter that bubblewrap hands to the kernel.

Namespaces and mounts of its own would give a program file systems without a size; files in memory, shared memory and
message queues are memory that belongs to no process; the rest only widens what of the kernel it can attack.
"""

import errno
import platform
import struct
from collections.abc import Iterator

# The numbers of linux/audit.h, and of asm/unistd.h on each architecture.
ARCHITECTURES = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}
DENIED = {
    "x86_64": {
        **{"unshare": 272, "setns": 308, "mount": 165, "umount2": 166, "pivot_root": 155, "open_by_handle_at": 304},
        **{"memfd_create": 319, "shmget": 29, "msgget": 68, "mq_open": 240},
        **{"ptrace": 101, "bpf": 321, "userfaultfd": 323, "perf_event_open": 298},
        **{"add_key": 248, "request_key": 249, "keyctl": 250},
    },
    "aarch64": {
        **{"unshare": 97, "setns": 268, "mount": 40, "umount2": 39, "pivot_root": 41, "open_by_handle_at": 265},
        **{"memfd_create": 279, "shmget": 194, "msgget": 186, "mq_open": 180},
        **{"ptrace": 117, "bpf": 280, "userfaultfd": 282, "perf_event_open": 241},
        **{"add_key": 217, "request_key": 218, "keyctl": 219},
    },
}
# Newer calls have one number everywhere.
DENIED_EVERYWHERE = {
    **{"io_uring_setup": 425, "io_uring_enter": 426, "io_uring_register": 427},
    **{"open_tree": 428, "move_mount": 429, "fsopen": 430, "fsconfig": 431, "fsmount": 432, "mount_setattr": 442},
    **{"memfd_secret": 447},
}
CLONE = {"x86_64": 56, "aarch64": 220}
CLONE3 = 435  # its flags are in memory, out of the filter's sight; without it the C library uses clone
NAMESPACES = 0x7E02_0000  # every CLONE_NEW... flag of clone
X32 = 0x4000_0000  # the bit of a second set of numbers on x86_64

LOAD, EQUAL, AT_LEAST, ANY_BIT, RETURN = 0x20, 0x15, 0x35, 0x45, 0x06  # linux/bpf_common.h
NUMBER, ARCHITECTURE, FIRST_ARGUMENT = 0, 4, 16  # offsets in struct seccomp_data; the low half of the argument
KILL, REFUSE, ALLOW = 0x8000_0000, 0x0005_0000, 0x7FFF_0000


def seccomp_filter(machine: str | None = None) -> bytes:
    """The filter for this machine, an array of struct sock_filter; ValueError where its numbers are not known."""
    machine = machine or platform.machine()
    if machine not in ARCHITECTURES:
        raise ValueError(f"no filter of system calls is known for {machine}")
    return b"".join(struct.pack("=HBBI", *instruction) for instruction in _instructions(machine))


def _instructions(machine: str) -> Iterator[tuple[int, int, int, int]]:
    """Code, instructions to skip where it holds, to skip where it does not, and the operand."""
    yield LOAD, 0, 0, ARCHITECTURE
    yield EQUAL, 1, 0, ARCHITECTURES[machine]
    yield RETURN, 0, 0, KILL
    yield LOAD, 0, 0, NUMBER
    yield AT_LEAST, 0, 1, X32
    yield RETURN, 0, 0, KILL
    for number in {**DENIED[machine], **DENIED_EVERYWHERE}.values():
        yield EQUAL, 0, 1, number
        yield RETURN, 0, 0, REFUSE | errno.EPERM
    yield EQUAL, 0, 1, CLONE3
    yield RETURN, 0, 0, REFUSE | errno.ENOSYS
    yield EQUAL, 0, 3, CLONE[machine]
    yield LOAD, 0, 0, FIRST_ARGUMENT
    yield ANY_BIT, 0, 1, NAMESPACES
    yield RETURN, 0, 0, REFUSE | errno.EPERM
    yield RETURN, 0, 0, ALLOW
