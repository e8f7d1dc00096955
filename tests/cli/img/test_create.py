"""`pynbd img create` beside qemu-img's."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests import peers
from tests.cli.img.side_by_side import failure, img, ok, qemu_img, same

KEY = ("--object", "secret,id=s,data=abc")


@pytest.mark.parametrize(
    "words",
    [
        ("new.raw", "10M"),
        ("-f", "raw", "new.raw", "1.5G"),
        ("-f", "file", "new.raw", "1M"),
        ("new.raw", "1000"),
        ("new.raw", "0x1000"),
        ("new.raw", "10b"),
        ("new.raw", "+1M"),
        ("new.raw", " +0x200"),
        ("-o", "size=+1k", "new.raw"),
        ("new.raw", "++1M"),
        ("new.raw", "+-1M"),
        ("new.raw", "1M "),
        ("-o", "size=1M ", "new.raw"),
        ("new.raw", "0"),
        ("-q", "new.raw", "1M"),
        ("-o", "size=5M", "new.raw"),
        ("-o", "size=5M", "-o", "preallocation=off", "new.raw"),
        ("-o", "size=1M,size=2M", "new.raw"),
        ("-o", "preallocation=falloc", "new.raw", "1M"),
        ("-o", "preallocation=full", "new.raw", "1M"),
        ("new, with a comma.raw", "1k"),
        ("new.raw",),
        ("-o", "size=5M", "new.raw", "3M"),
        ("-o", "nonsense=1", "new.raw", "1M"),
        ("-f", "nonsense", "new.raw", "1M"),
        ("-b", "other.raw", "-F", "raw", "new.raw", "1M"),
        ("new.raw", "-1"),
        ("new.raw", "1X"),
        ("new.raw", "1k5"),
        ("new.raw", "8E"),
        ("new.raw", "10", "20"),
        ("missing/new.raw", "1M"),
        ("-o", "size=1M,", "new.raw"),
        ("json:{}", "1M"),
        ("-o", "nocow=on", "new.raw", "1M"),
        ("-o", "extent_size_hint=64k,nocow=off,preallocation=off", "new.raw", "1M"),
        ("-o", "extent_size_hint=0", "new.raw", "1M"),
        ("-o", "nocow=maybe", "new.raw", "1M"),
        ("-o", "extent_size_hint=-1", "new.raw", "1M"),
        (),
    ],
)
def test_raw(words: tuple[str, ...], folder: Path) -> None:
    """The same is said, and the same file is made, or none."""
    theirs = qemu_img("create", *words)
    files = _files(folder)
    for path in folder.iterdir():
        path.unlink()
    ours = img("create", *words)
    assert (ours.status, ours.out) == (theirs.status, theirs.out), (ours, theirs)
    assert _files(folder) == files


def _files(folder: Path) -> dict[str, tuple[int, int]]:
    """The length of each file and what it takes on the disk, in pieces of 64 KiB: QEMU always takes a first block."""
    return {path.name: (path.stat().st_size, path.stat().st_blocks >> 7) for path in folder.iterdir()}


def test_a_file_is_no_device(folder: Path) -> None:
    """Nothing is made where a device was expected."""
    assert qemu_img("create", "-f", "host_device", "new.raw", "1M").status == 1
    told = failure("create", "-f", "host_device", "new.raw", "1M")
    assert "new.raw is nothing for driver 'host_device', but for 'file'" in told
    assert not list(folder.iterdir())


def test_a_file_that_is_there_is_overwritten(disk: Path) -> None:
    ok("create", disk, "1M")
    assert disk.read_bytes() == bytes(1 << 20)


def test_a_link_to_what_is_not_there_yet(folder: Path) -> None:
    """The file that it names is made."""
    Path("link.raw").symlink_to("target.raw")
    ok("create", "link.raw", "1M")
    assert Path("target.raw").stat().st_size == 1 << 20
    assert Path("link.raw").is_symlink()


def test_luks(folder: Path) -> None:
    """Options of a format, and an object that they refer to; qemu-img opens what was made."""
    options = "key-secret=s,iter-time=10,cipher-alg=aes-128"
    theirs = qemu_img("create", *KEY, "-f", "luks", "-o", options, "a.luks", "1M")
    Path("a.luks").unlink()
    assert ok("create", *KEY, "-f", "luks", "-o", options, "a.luks", "1M") == theirs.out
    compared = qemu_img(
        *("compare", *KEY, "--image-opts", "driver=luks,key-secret=s,file.filename=a.luks"),
        *("driver=luks,key-secret=s,file.filename=a.luks",),
    )
    assert compared.status == 0, compared


def test_luks_in_no_time(folder: Path) -> None:
    """QEMU opens what has as few iterations as there may be."""
    ok("create", "-q", "-f", "luks", *KEY, "-o", "key-secret=s,iter-time=0", "a.luks", "1M")
    assert qemu_img("info", "a.luks").out.count("iters: 1000\n") == 2
    image = "driver=luks,key-secret=s,file.filename=a.luks"
    assert qemu_img("convert", *KEY, "--image-opts", image, "-O", "raw", "a.raw").status == 0


def test_no_name(folder: Path) -> None:
    assert "is empty" in failure("create", "", "1M")
    Path("source.raw").write_bytes(bytes(512))
    assert "is empty" in failure("convert", "source.raw", "")
    assert "is empty" in failure("dd", "if=source.raw", "of=")


@pytest.mark.parametrize("option", ["encrypt.key-secret=s", "encrypt.iter-time=10"])
def test_encrypted_in_no_format(option: str, folder: Path) -> None:
    """Somebody believes that the image is encrypted, and it would not be."""
    words = (*KEY, "-f", "qcow2", "-o", option, "a.qcow2", "1M")
    assert qemu_img("create", *words).status == 1
    assert "encrypt.format is missing" in failure("create", *words)
    assert list(folder.iterdir()) == []


def test_the_order_of_options_of_an_encrypted_image(folder: Path) -> None:
    options = "encrypt.iter-time=10,encrypt.key-secret=s,encrypt.cipher-alg=aes-128,encrypt.format=luks"
    same("create", *KEY, "-f", "qcow2", "-o", options, "a.qcow2", "1M")
    image = "driver=qcow2,encrypt.key-secret=s,encrypt.format=luks,file.filename=a.qcow2"
    assert "json:" in same("info", *KEY, "--image-opts", image)


@pytest.mark.parametrize("number", ["8", "0x8", "010", "+8", " 8", "8 ", "08", "0x", "8k", "-8", ""])
def test_numbers_of_options(number: str, folder: Path) -> None:
    """As C reads them."""
    words = ("create", "-f", "qcow2", "-o", f"refcount_bits={number}", "disk.qcow2", "1M")
    theirs = qemu_img(*words)
    Path("disk.qcow2").unlink(missing_ok=True)
    ours = img(*words)
    assert ours.status == theirs.status, (ours, theirs)
    if ours.status == 0:
        assert ours.out == theirs.out
        assert "refcount bits: 8\n" in qemu_img("info", "disk.qcow2").out


def test_nothing_half_made_is_left(folder: Path) -> None:
    """A secret is found to be missing only when the file is there already."""
    assert "secret" in failure("create", "-q", "-f", "luks", "-o", "key-secret=nobody", "a.luks", "1M")
    assert list(folder.iterdir()) == []


def test_nothing_half_made_is_left_behind_a_link(folder: Path) -> None:
    """The link itself was there before."""
    for link in ("link.qcow2", "again.qcow2"):
        Path(link).symlink_to("target.qcow2")
    Path("loop.raw").symlink_to("loop.raw")
    assert "missing/data" in failure("create", "-q", "-f", "qcow2", "-o", "data_file=missing/data", "link.qcow2", "1M")
    assert "missing" in failure("create", "-q", "-f", "qcow2", "-o", "data_file=again.qcow2", "missing/disk", "1M")
    assert "symbolic links" in failure("create", "-q", "loop.raw", "1M")
    assert sorted(path.name for path in folder.iterdir()) == ["again.qcow2", "link.qcow2", "loop.raw"]


def test_into_what_can_not_be_resized(disk: Path) -> None:
    """A server's export that is large enough will do."""
    with peers.qemu_nbd(disk) as server:
        ok("create", "-q", server.uri(), "1M")
        assert img("create", "-q", server.uri(), "1G").status == 1


def test_a_hint_that_is_too_large(folder: Path) -> None:
    """The kernel has 32 bits for it. qemu-img finds it out after it has told what it will make."""
    words = ("-o", "extent_size_hint=4G", "new.raw", "1M")
    assert qemu_img("create", *words).status == 1
    assert "extent_size_hint" in failure("create", *words)
    assert not list(folder.iterdir())


@pytest.mark.parametrize("data", [(), ("data_file=d.raw",)])
def test_options_of_the_file_go_with_those_of_the_format(data: tuple[str, ...], folder: Path) -> None:
    for given in ("nocow=on,refcount_bits=8", "lazy_refcounts=on,extent_size_hint=0,nocow=on"):
        assert "nocow=on" in same("create", "-f", "qcow2", "-o", ",".join((given, *data)), "a.qcow2", "1M")
        qemu_img("check", "-q", "a.qcow2")


@pytest.mark.parametrize("format", ["raw", "qcow2", "luks"])
@pytest.mark.parametrize("words", [(), ("source.img", "new.img")])
@pytest.mark.parametrize("verb", ["create", "convert"])
def test_help_lists_the_options_of_qemu_img(verb: str, words: tuple[str, ...], format: str) -> None:
    """Those of the file as well, if there is a name; one that is the storage's for QEMU is a format's here."""
    which, most = ("-f", 1) if verb == "create" else ("-O", 2)
    ours, theirs = (run(verb, which, format, "-o", "help", *words[-most:]) for run in (img, qemu_img))
    assert (ours.status, ours.err) == (theirs.status, theirs.err) == (0, "")
    assert ours.out.splitlines()[0] == theirs.out.splitlines()[0]
    names = [{line.split()[0] for line in told.out.splitlines() if line[:2] == "  "} for told in (ours, theirs)]
    assert names[0] - {"preallocation=<str>"} == names[1] - {"preallocation=<str>"}
    assert ("may take more options" in ours.out) == ("may support further options" in theirs.out) == (not words)


def test_help() -> None:
    assert "  size=<size> " in ok("create", "-f", "raw", "-o", "help")
    assert "  key-secret=<str> " in ok("create", "-f", "luks", "-o", "size=1M,help")
    assert same("create", "-f", "nonsense", "-o", "help") == ""


def test_an_unknown_format_below_is_refused_unseen(folder: Path) -> None:
    assert "foo" in failure("create", "-f", "qcow2", "-u", "-b", "missing", "-F", "foo", "a.qcow2", "1M")
    assert qemu_img("create", "-f", "qcow2", "-u", "-b", "missing", "-F", "foo", "b.qcow2", "1M").status == 1
    assert not list(folder.iterdir())


@pytest.mark.parametrize("name", ["a.qcow2", "./a.qcow2", "link", "{folder}/a.qcow2"])
@pytest.mark.parametrize("verb", ["create", "convert"])
def test_no_image_is_its_own_backing_file(verb: str, name: str, folder: Path) -> None:
    """qemu-img makes such images, and then eats memory without end when it opens one."""
    ok("create", "-q", "-f", "qcow2", "a.qcow2", "1M")
    ok("create", "-q", "-f", "qcow2", "source.qcow2", "1M")
    (folder / "link").symlink_to("a.qcow2")
    before = (folder / "a.qcow2").read_bytes()
    backing = ("-F", "qcow2", "-b" if verb == "create" else "-B", name.format(folder=folder))
    words = ("-f", "qcow2", *backing) if verb == "create" else ("-O", "qcow2", *backing, "source.qcow2")
    assert "can't be its own backing file" in failure(verb, *words, "a.qcow2")
    assert (folder / "a.qcow2").read_bytes() == before
    if verb == "create":
        (folder / "a.qcow2").unlink()
        assert "can't be its own backing file" in failure(verb, *words, "-u", "a.qcow2", "1M")
        assert not (folder / "a.qcow2").exists()
