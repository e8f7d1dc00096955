"""What an export refuses, and with what error."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nbd_protocol.constants import (
    MAX_PAYLOAD_BYTES,
    MIB,
    Command,
    CommandFlag,
    Errno,
    ReplyMode,
    TransmissionFlag,
)
from nbd_protocol.errors import LocalProtocolError
from nbd_protocol.transmission import ExportRules, Request

SIZE = 1 << 20
T = TransmissionFlag
EVERYTHING = T((1 << 13) - 1) & ~T.READ_ONLY
RANGED = [Command.READ, Command.WRITE, Command.TRIM, Command.CACHE, Command.WRITE_ZEROES, Command.BLOCK_STATUS]


def rules(
    size: int = SIZE,
    flags: int = EVERYTHING,
    mode: ReplyMode = ReplyMode.EXTENDED,
    min_block: int = 1,
    max_payload: int = MAX_PAYLOAD_BYTES,
) -> ExportRules:
    contexts = () if mode is ReplyMode.SIMPLE else (1, 2, 3)
    return ExportRules(size, flags, min_block=min_block, max_payload=max_payload, mode=mode, context_ids=contexts)


def refusal(the_rules: ExportRules, command: int, offset: int = 0, length: int = 0, flags: int = 0) -> Errno | None:
    found = the_rules.refusal(Request(command, flags, 1, offset, length))
    if found is None:
        return None
    assert found[1], "a refusal has a text"
    return found[0]


def past_end(command: Command) -> Errno:
    return Errno.ENOSPC if command in (Command.WRITE, Command.WRITE_ZEROES) else Errno.EINVAL


@pytest.mark.parametrize("command", RANGED)
@pytest.mark.parametrize(
    ("offset", "length"),
    [
        (SIZE, 1),
        (SIZE - 1, 2),
        (0, SIZE + 1),
        (2**64 - 512, 512),
        (2**64 - 512, 1024),
        (2**64 - 1, 2**64 - 1),
        (2**63, 2**63),
    ],
)
def test_conformance_14_bounds_without_overflow(command: Command, offset: int, length: int) -> None:
    assert refusal(rules(), command, offset, length) is past_end(command)


@pytest.mark.parametrize("command", RANGED)
def test_conformance_14_what_ends_at_the_end_is_within(command: Command) -> None:
    assert refusal(rules(), command, SIZE - 512, 512) is None
    assert refusal(rules(), command, 0, SIZE) is None


@pytest.mark.parametrize("command", [Command.WRITE, Command.TRIM, Command.WRITE_ZEROES, Command.RESIZE])
@pytest.mark.parametrize("offset", [0, 2**64 - 512])
def test_conformance_14_read_only_is_eperm(command: Command, offset: int) -> None:
    assert refusal(rules(flags=EVERYTHING | T.READ_ONLY), command, offset, 512) is Errno.EPERM


@pytest.mark.parametrize("command", [Command.READ, Command.CACHE, Command.FLUSH, Command.BLOCK_STATUS])
def test_a_read_only_export_can_be_read(command: Command) -> None:
    assert refusal(rules(flags=EVERYTHING | T.READ_ONLY), command, 0, 512) is None


@pytest.mark.parametrize("command", [Command.READ, Command.WRITE])
def test_conformance_15_up_to_32_mib_is_always_served(command: Command) -> None:
    large = rules(size=1 << 40, max_payload=MIB)
    assert refusal(large, command, 0, MAX_PAYLOAD_BYTES) is None
    assert refusal(large, command, 0, MAX_PAYLOAD_BYTES + 1) is Errno.EINVAL
    larger = rules(size=1 << 40, max_payload=2 * MAX_PAYLOAD_BYTES)
    assert refusal(larger, command, 0, 2 * MAX_PAYLOAD_BYTES) is None


@pytest.mark.parametrize("command", [Command.TRIM, Command.WRITE_ZEROES, Command.CACHE, Command.BLOCK_STATUS])
def test_conformance_15_effects_may_be_longer_than_any_payload(command: Command) -> None:
    assert refusal(rules(size=1 << 62), command, 0, 1 << 62) is None


@pytest.mark.parametrize("mode", ReplyMode)
@pytest.mark.parametrize("command", [9, 100, 65535])
def test_conformance_16_unknown_commands_are_einval(mode: ReplyMode, command: int) -> None:
    assert refusal(rules(mode=mode), command, 0, 512) is Errno.EINVAL


@pytest.mark.parametrize("mode", ReplyMode)
@pytest.mark.parametrize("command", RANGED)
@pytest.mark.parametrize("bit", range(6, 16))
def test_conformance_16_unknown_flags_are_einval(mode: ReplyMode, command: Command, bit: int) -> None:
    assert refusal(rules(mode=mode), command, 0, 512, 1 << bit) is Errno.EINVAL


@pytest.mark.parametrize("command", [*RANGED, Command.FLUSH, Command.RESIZE])
def test_conformance_16_fua_is_accepted_on_every_command(command: Command) -> None:
    length = 0 if command is Command.RESIZE else 512
    assert refusal(rules(), command, 0, length, CommandFlag.FUA) is None
    assert refusal(rules(flags=EVERYTHING & ~T.SEND_FUA), command, 0, length, CommandFlag.FUA) is Errno.EINVAL


F = CommandFlag
BELONGS = {
    (Command.READ, F.DF),
    (Command.WRITE, F.PAYLOAD_LEN),
    (Command.WRITE_ZEROES, F.NO_HOLE),
    (Command.WRITE_ZEROES, F.FAST_ZERO),
    (Command.BLOCK_STATUS, F.REQ_ONE),
    (Command.BLOCK_STATUS, F.PAYLOAD_LEN),
}


@pytest.mark.parametrize("flag", [F.NO_HOLE, F.DF, F.REQ_ONE, F.FAST_ZERO, F.PAYLOAD_LEN])
@pytest.mark.parametrize("command", RANGED)
def test_conformance_16_each_flag_belongs_to_its_commands(command: Command, flag: CommandFlag) -> None:
    expected = None if (command, flag) in BELONGS else Errno.EINVAL
    assert refusal(rules(), command, 0, 512, flag) is expected


def test_conformance_13_df_needs_chunked_replies() -> None:
    assert refusal(rules(mode=ReplyMode.SIMPLE), Command.READ, 0, 512, F.DF) is Errno.EINVAL
    for mode in (ReplyMode.STRUCTURED, ReplyMode.EXTENDED):
        assert refusal(rules(mode=mode), Command.READ, 0, 65536, F.DF) is None


@pytest.mark.parametrize("mode", [ReplyMode.SIMPLE, ReplyMode.STRUCTURED])
@pytest.mark.parametrize("command", [Command.WRITE, Command.BLOCK_STATUS])
def test_conformance_23_payload_len_needs_extended_headers(mode: ReplyMode, command: Command) -> None:
    assert refusal(rules(mode=mode), command, 0, 512, F.PAYLOAD_LEN) is Errno.EINVAL


@pytest.mark.parametrize(
    ("command", "flag"),
    [
        (Command.FLUSH, T.SEND_FLUSH),
        (Command.TRIM, T.SEND_TRIM),
        (Command.CACHE, T.SEND_CACHE),
        (Command.WRITE_ZEROES, T.SEND_WRITE_ZEROES),
        (Command.RESIZE, T.SEND_RESIZE),
    ],
)
def test_commands_that_were_not_offered_are_einval(command: Command, flag: TransmissionFlag) -> None:
    assert refusal(rules(), command) is None
    assert refusal(rules(flags=EVERYTHING & ~flag), command) is Errno.EINVAL


def test_conformance_17_zero_length_is_harmless() -> None:
    for command in (Command.READ, Command.WRITE, Command.TRIM, Command.CACHE, Command.WRITE_ZEROES):
        for offset in (0, 512, SIZE):
            assert refusal(rules(min_block=512), command, offset) is None
        assert refusal(rules(), command, SIZE + 1) is past_end(command)


@pytest.mark.parametrize("command", RANGED)
def test_conformance_17_misaligned_is_einval(command: Command) -> None:
    aligned = rules(min_block=512)
    assert refusal(aligned, command, 512, 1024) is None
    for offset, length in [(1, 512), (0, 511), (511, 1), (256, 256)]:
        assert refusal(aligned, command, offset, length) is Errno.EINVAL


def test_conformance_17_the_odd_tail_of_an_export_can_be_reached() -> None:
    odd = rules(size=1000, min_block=512)
    assert refusal(odd, Command.READ, 512, 488) is None
    assert refusal(odd, Command.READ, 0, 1000) is None
    assert refusal(odd, Command.READ, 0, 488) is Errno.EINVAL
    assert refusal(odd, Command.READ, 512, 512) is Errno.EINVAL
    assert refusal(odd, Command.WRITE, 512, 512) is Errno.ENOSPC


def test_conformance_18_fast_zero_must_have_been_offered() -> None:
    flags = F.FAST_ZERO | F.NO_HOLE
    assert refusal(rules(), Command.WRITE_ZEROES, 0, 512, flags) is None
    assert refusal(rules(flags=EVERYTHING & ~T.SEND_FAST_ZERO), Command.WRITE_ZEROES, 0, 512, flags) is Errno.EINVAL


def test_conformance_19_block_status_needs_a_context() -> None:
    for mode in ReplyMode:
        without = ExportRules(SIZE, EVERYTHING, mode=mode)
        assert refusal(without, Command.BLOCK_STATUS, 0, 512) is Errno.EINVAL


def test_conformance_19_a_status_of_nothing_is_einval() -> None:
    assert refusal(rules(), Command.BLOCK_STATUS, 0, 0) is Errno.EINVAL


def test_conformance_19_the_longest_32_bit_length_works() -> None:
    assert refusal(rules(size=1 << 40), Command.BLOCK_STATUS, 0, 0xFFFFFFFF) is None
    assert refusal(rules(size=1 << 40, mode=ReplyMode.STRUCTURED), Command.BLOCK_STATUS, 0, 0xFFFFFFFF) is None


@pytest.mark.parametrize(
    ("context_ids", "expected"),
    [
        ((1,), None),
        ((3, 1), None),
        ((1, 2, 3), None),
        ((), Errno.EINVAL),
        ((1, 1), Errno.EINVAL),
        ((1, 4), Errno.EINVAL),
    ],
)
def test_conformance_23_the_payload_form_names_a_subset(context_ids: tuple[int, ...], expected: Errno | None) -> None:
    request = Request(Command.BLOCK_STATUS, F.PAYLOAD_LEN, 1, 0, 512, context_ids=context_ids)
    found = rules().refusal(request)
    assert (found[0] if found else None) is expected


def test_conformance_23_the_payload_form_must_have_been_offered() -> None:
    request = Request(Command.BLOCK_STATUS, F.PAYLOAD_LEN, 1, 0, 512, context_ids=(1,))
    found = rules(flags=EVERYTHING & ~T.BLOCK_STATUS_PAYLOAD).refusal(request)
    assert found is not None
    assert found[0] is Errno.EINVAL


@pytest.mark.parametrize("command", [Command.READ, Command.WRITE, Command.TRIM, 99])
def test_what_the_framing_refused_stays_refused(command: int) -> None:
    request = Request(command, 0, 1, 0, 512, refused=Errno.EINVAL, reason="because")
    assert rules().refusal(request) == (Errno.EINVAL, "because")


def test_disc_is_never_refused() -> None:
    for flags in (0, F.FUA, 0xFFFF):
        assert refusal(rules(flags=0), Command.DISC, 2**64 - 1, 5, flags) is None


def test_a_live_resize_moves_the_bounds() -> None:
    resized = rules()
    assert refusal(resized, Command.READ, SIZE, 512) is Errno.EINVAL
    resized.size = SIZE + 512
    assert refusal(resized, Command.READ, SIZE, 512) is None
    resized.size = 512
    assert refusal(resized, Command.WRITE, 0, 1024) is Errno.ENOSPC


@pytest.mark.parametrize("min_block", [0, 3, 131072, -1])
def test_impossible_minimum_blocks_are_our_error(min_block: int) -> None:
    with pytest.raises(LocalProtocolError, match="power of two"):
        ExportRules(SIZE, 0, min_block=min_block)


@given(
    command=st.integers(0, 9),
    offset=st.integers(0, 2**64 - 1) | st.integers(0, 2048),
    length=st.integers(0, 2**64 - 1) | st.integers(0, 2048),
    flags=st.integers(0, 63) | st.integers(0, 65535),
    offered=st.integers(0, 65535),
    size=st.integers(0, 2**63) | st.integers(0, 4096),
    mode=st.sampled_from(ReplyMode),
    min_block=st.sampled_from([1, 512, 4096]),
)
def test_what_passes_lies_within_the_export(
    command: int, offset: int, length: int, flags: int, offered: int, size: int, mode: ReplyMode, min_block: int
) -> None:
    the_rules = rules(size, offered, mode, min_block)
    found = refusal(the_rules, command, offset, length, flags)
    if found is None and command in RANGED:
        assert offset + length <= size
        assert offset % min_block == 0
        assert length % min_block == 0 or offset + length == size
        assert not flags & ~0x3F
        if command in (Command.WRITE, Command.TRIM, Command.WRITE_ZEROES):
            assert not offered & T.READ_ONLY
    if found is not None:
        assert found in (Errno.EINVAL, Errno.ENOSPC, Errno.EPERM)
