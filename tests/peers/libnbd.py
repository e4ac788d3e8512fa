"""What libnbd lets a client do wrong once its own checks are off: libnbd.py URI.

Runs every function whose name begins with `check_`, each on connections of its own, and exits non-zero at the first
difference. Named after the protocol rules (C48, ...) they show.
"""

import errno
import sys

import nbd

URI = sys.argv[1]
KIB, MIB = 1 << 10, 1 << 20
UNKNOWN_FLAG = 0x8000


def connected(structured=True):
    handle = nbd.NBD()
    handle.set_uri_allow_local_file(True)
    handle.set_strict_mode(0)
    handle.set_request_structured_replies(structured)
    if structured:
        handle.add_meta_context("base:allocation")
    handle.connect_uri(URI)
    return handle


def negotiating():
    handle = nbd.NBD()
    handle.set_uri_allow_local_file(True)
    handle.set_opt_mode(True)
    handle.add_meta_context("base:allocation")
    handle.connect_uri(URI)
    return handle


def refused(expected, call, *arguments):
    try:
        call(*arguments)
    except nbd.Error as error:
        assert error.errnum == expected, f"{call.__name__}{arguments[1:]}: {error}, not {errno.errorcode[expected]}"
    else:
        raise AssertionError(f"{call.__name__}{arguments[1:]} succeeded, not {errno.errorcode[expected]}")


def no_extents(*_):
    return 0


def still_works(handle):
    """The connection is usable and in step: it reads back what it writes."""
    content = bytes(range(256)) * 2
    handle.pwrite(content, 4096)
    assert handle.pread(512, 4096) == content


def check_c48_beyond_the_end():
    handle = connected()
    size = handle.get_size()
    block = b"x" * 512
    for offset in (size, size - 256, 2**63 - 1, 2**64 - 256):
        refused(errno.EINVAL, handle.pread, 512, offset)
        refused(errno.ENOSPC, handle.pwrite, block, offset)
        refused(errno.ENOSPC, handle.zero, 512, offset)
        refused(errno.EINVAL, handle.trim, 512, offset)
        refused(errno.EINVAL, handle.block_status, 512, offset, no_extents)
        still_works(handle)
    assert handle.pread(256, size - 256) == bytes(256), "a refused write reached the end of the export"


def check_c49_any_alignment():
    """The advertised minimum is one byte, so nothing is unaligned, and neighbours are left alone."""
    handle = connected()
    for offset, length in ((1, 1), (511, 3), (4095, 2), (8191, 4099)):
        before = handle.pread(16 * KIB, 0)
        handle.pwrite(b"\xa5" * length, offset)
        expected = before[:offset] + b"\xa5" * length + before[offset + length :]
        assert handle.pread(16 * KIB, 0) == expected, f"{length} bytes at {offset}"


def check_c50_large_payloads():
    """32 MiB are served; more is an error or ends the connection, and harms nobody else."""
    handle = connected()
    payload = bytes([7]) * (32 * MIB)
    handle.pwrite(payload, 0)
    assert handle.pread(32 * MIB, 0) == payload
    refused(errno.EINVAL, handle.pread, 32 * MIB + 1, 0)
    still_works(handle)
    other = connected()
    for length in (32 * MIB + 1, 64 * MIB):
        handle = connected()
        try:
            handle.pwrite(bytes(length), 0)
        except nbd.Error:
            pass
        else:
            raise AssertionError(f"a write of {length} bytes succeeded")
        assert other.pread(512, 32 * MIB - 512) == payload[:512], "a refused write was written"
        still_works(other)


def check_c51_nothing_at_all():
    handle = connected()
    for call in (
        lambda: handle.pread(0, 0),
        lambda: handle.pwrite(b"", 0),
        lambda: handle.zero(0, 0),
        lambda: handle.trim(0, 0),
        lambda: handle.block_status(0, 0, no_extents),
    ):
        try:
            call()
        except nbd.Error as error:
            assert error.errnum == errno.EINVAL, error
        still_works(handle)


def check_c52_flags_without_meaning():
    handle = connected()
    payload = b"y" * 512
    before = handle.pread(512, 64 * KIB)
    refused(errno.EINVAL, handle.pread, 512, 0, UNKNOWN_FLAG)
    refused(errno.EINVAL, handle.pread, 512, 0, nbd.CMD_FLAG_NO_HOLE)
    refused(errno.EINVAL, handle.pwrite, payload, 64 * KIB, UNKNOWN_FLAG)
    refused(errno.EINVAL, handle.pwrite, payload, 64 * KIB, nbd.CMD_FLAG_DF)
    refused(errno.EINVAL, handle.flush, UNKNOWN_FLAG)
    refused(errno.EINVAL, handle.trim, 512, 64 * KIB, nbd.CMD_FLAG_FAST_ZERO)
    refused(errno.EINVAL, handle.zero, 512, 64 * KIB, nbd.CMD_FLAG_REQ_ONE)
    refused(errno.EINVAL, handle.cache, 512, 0, UNKNOWN_FLAG)
    refused(errno.EINVAL, handle.block_status, 512, 0, no_extents, UNKNOWN_FLAG)
    assert handle.pread(512, 64 * KIB) == before
    still_works(handle)


def check_c53_fua_on_every_command():
    handle = connected()
    fua = nbd.CMD_FLAG_FUA
    handle.pwrite(b"z" * 512, 0, fua)
    assert handle.pread(512, 0, fua) == b"z" * 512
    handle.zero(512, 0, fua)
    handle.trim(512, 0, fua)
    handle.cache(512, 0, fua)
    handle.flush(fua)
    handle.block_status(512, 0, no_extents, fua)
    still_works(handle)


def check_c47_without_structured_replies():
    handle = connected(structured=False)
    assert not handle.get_structured_replies_negotiated()
    refused(errno.EINVAL, handle.block_status, 512, 0, no_extents)
    refused(errno.EINVAL, handle.pread, 512, 0, nbd.CMD_FLAG_DF)
    refused(errno.EINVAL, handle.pread, 512, handle.get_size())
    still_works(handle)


def check_c46_many_requests_in_flight():
    """Replies come in any order; each belongs to its own request."""
    handle = connected()
    count, length = 64, 16 * KIB
    for index in range(count):
        handle.pwrite(bytes([index]) * length, index * length)
    buffers = [nbd.Buffer(length) for _ in range(count)]
    cookies = {}
    for index in reversed(range(count)):
        cookies[handle.aio_pread(buffers[index], index * length)] = index
    while cookies:
        handle.poll(-1)
        for cookie in [cookie for cookie in cookies if handle.aio_command_completed(cookie)]:
            index = cookies.pop(cookie)
            assert buffers[index].to_bytearray() == bytes([index]) * length, index


def check_c53_flush_covers_other_connections():
    """With CAN_MULTI_CONN a write that was answered on one connection is read on another at once."""
    first, second = connected(), connected()
    assert first.can_multi_conn()
    for index in range(16):
        content = bytes([index]) * 4096
        first.pwrite(content, index * 4096)
        assert second.pread(4096, index * 4096) == content
    second.flush()


def check_c55_zeroes_and_extents():
    handle = connected()
    handle.pwrite(b"d" * (256 * KIB), 0)
    handle.zero(64 * KIB, 64 * KIB)
    handle.zero(64 * KIB, 128 * KIB, nbd.CMD_FLAG_NO_HOLE)
    assert handle.pread(256 * KIB, 0) == b"d" * (64 * KIB) + bytes(128 * KIB) + b"d" * (64 * KIB)
    extents = []

    def collect(context, offset, entries, _error):
        assert context == "base:allocation", context
        extents.extend(zip(entries[::2], entries[1::2]))

    handle.block_status(256 * KIB, 0, collect)
    covered = 0
    for length, flags in extents:
        assert length > 0
        end = min(covered + length, 256 * KIB)
        if flags & nbd.STATE_ZERO:
            assert handle.pread(end - covered, covered) == bytes(end - covered)
        if flags & nbd.STATE_HOLE:
            # An allocated range that was never written is a hole to SEEK_HOLE, so NO_HOLE may show as one.
            assert 64 * KIB <= covered and end <= 192 * KIB, f"a hole at {covered} of {length} bytes"
        covered += length
    assert extents
    extents.clear()
    handle.block_status(256 * KIB, 0, collect, nbd.CMD_FLAG_REQ_ONE)
    assert len(extents) == 1 and extents[0][0] <= 256 * KIB, extents


def check_c34_exports_that_do_not_exist():
    handle = negotiating()
    for name in ("nothing", "disk/x", "Disk", "x" * 4096):
        handle.set_export_name(name)
        refused(errno.ENOENT, handle.opt_info)
    handle.set_export_name("disk")
    handle.opt_info()
    size = handle.get_size()
    handle.opt_go()
    assert handle.get_size() == size
    assert handle.can_meta_context("base:allocation")


def check_options_in_any_order():
    handle = negotiating()
    assert handle.get_tls_negotiated()
    exports, contexts = [], []
    assert handle.opt_list(lambda name, _: exports.append(name)) == 1
    assert exports == ["disk"], exports
    handle.set_export_name("disk")
    handle.opt_list_meta_context(contexts.append)
    assert contexts == ["base:allocation"], contexts
    handle.opt_info()
    handle.opt_list(lambda *_: None)
    handle.opt_go()
    handle.pread(512, 0)
    handle = negotiating()
    handle.opt_abort()
    assert handle.aio_is_closed()


def main():
    checks = [value for name, value in sorted(globals().items()) if name.startswith("check_")]
    for check in checks:
        try:
            check()
        except (AssertionError, nbd.Error) as error:
            sys.exit(f"{check.__name__}: {error!r}")
        print(check.__name__, "ok")
    print(len(checks), "checks")


main()
