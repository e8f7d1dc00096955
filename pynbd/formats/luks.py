"""`luks`: an encrypted disk, in a LUKS1 container as cryptsetup and QEMU make them.

Limits: LUKS version 1 only. The cipher is AES in the modes xts, cbc, ctr and ecb with the IVs plain, plain64 and essiv;
serpent, twofish and the others are refused by name. Sectors have 512 bytes. Discards stay up here, for they would show
which sectors are in use; what a new image holds is noise.
"""

import asyncio
import errno
from collections.abc import Mapping
from typing import Any, ClassVar, Protocol

import msgspec

from pynbd.block import options as opt
from pynbd.block.alignment import pieces, round_down, round_up
from pynbd.block.backend import BlockBackend
from pynbd.block.driver import ChildSpec, CreationOptions, Driver, ImageInfo, Preallocation
from pynbd.block.errors import ImageError, OptionError, PermissionConflict, io_error
from pynbd.block.families import Measurement, Progress, no_progress
from pynbd.block.limits import Limits
from pynbd.block.objects import Objects
from pynbd.block.options import MAX_SIZE_BYTES, NodeOptions
from pynbd.block.permissions import ChildRole, Permission
from pynbd.block.requests import RequestFlag
from pynbd.crypto.ciphers import PIECE_BYTES, SECTOR_BYTES, SectorCipher
from pynbd.crypto.layout import MAGIC
from pynbd.crypto.luks import Luks, header_bytes
from pynbd.crypto.luks_options import DEFAULT_ITER_TIME_MS, IterTime, LuksAmendOptions, LuksOptions
from pynbd.crypto.secrets import Secret

WRITE_BYTES = 1 << 20
"""What is encrypted before it is written: so much memory a write takes."""

VERSION_1 = MAGIC + b"\0\1"


class LuksFormatOptions(NodeOptions, frozen=True, kw_only=True):
    """Options of the driver `luks`.

    Args:
        key_secret: the secret with a passphrase; without it the image can be looked at, but not read.
    """

    key_secret: str | None = None


class LuksCreationOptions(CreationOptions, frozen=True, kw_only=True, rename="kebab"):
    """Options of a new image.

    Args:
        key_secret: the secret with the passphrase of the first key slot.
        cipher_alg: `aes-128`, `aes-192`, `aes-256`.
        cipher_mode: `xts`, `cbc`, `ctr`, `ecb`.
        ivgen_alg: `plain64`, `plain`, `essiv`.
        ivgen_hash_alg: of `essiv`: `sha256`, `md5`.
        hash_alg: of PBKDF2.
        iter_time: milliseconds that each try of a passphrase takes on this machine.
    """

    key_secret: str = ""
    cipher_alg: str = "aes-256"
    cipher_mode: str = "xts"
    ivgen_alg: str = "plain64"
    ivgen_hash_alg: str = ""
    hash_alg: str = "sha256"
    iter_time: IterTime = DEFAULT_ITER_TIME_MS

    def container(self) -> LuksOptions:
        """What the container takes of them."""
        return LuksOptions(**{name: getattr(self, name) for name in LuksOptions.__struct_fields__})


class Bytes(Protocol):
    """A file below: a `Child`, or a `BlockBackend` while an image is made."""

    async def read(self, offset: int, into: memoryview, flags: int, /) -> None:
        """Fill `into`."""

    async def write(self, offset: int, data: memoryview, flags: int, /) -> None:
        """Put `data` there."""

    async def flush(self) -> None:
        """Make it durable."""


class FileHeader:
    """The header of a container that begins where its file begins."""

    def __init__(self, file: Bytes) -> None:
        self._file = file

    async def read(self, offset: int, length: int) -> bytes:
        """See `HeaderStore`; behind the end of the file are zeroes."""
        buffer = bytearray(length)
        await self._file.read(offset, memoryview(buffer), 0)
        return bytes(buffer)

    async def write(self, offset: int, data: bytes) -> None:
        """See `HeaderStore`."""
        await self._file.write(offset, memoryview(data), 0)

    async def flush(self) -> None:
        """See `HeaderStore`."""
        await self._file.flush()


class LuksFormat(Driver):
    """An encrypted disk in a LUKS1 container."""

    name = "luks"
    is_format = True
    several_processes = "always"  # all that it keeps is the key
    Options = LuksFormatOptions
    CreateOptions = LuksCreationOptions
    AmendOptions: ClassVar[type[msgspec.Struct]] = LuksAmendOptions
    children: ClassVar[Mapping[str, ChildSpec]] = {"file": ChildSpec(ChildRole.DATA | ChildRole.METADATA)}
    limits = Limits(request_alignment=SECTOR_BYTES)
    write_flags = int(RequestFlag.FUA)

    options: LuksFormatOptions

    def __init__(self, options: NodeOptions) -> None:
        super().__init__(options)
        self._luks: Luks | None = None
        self._cipher: SectorCipher | None = None
        self._payload = 0

    @classmethod
    def probe(cls, head: bytes, filename: str) -> int:
        return 100 if head.startswith(VERSION_1) else 0

    # --- life ----------------------------------------------------------------------------------------------

    async def open(self) -> None:
        image = self.node.filename() or self.node.name
        self._luks = luks = await Luks.load(FileHeader(self.file), image)
        self._payload = luks.payload_offset
        if not SECTOR_BYTES <= self._payload <= self.file.size:
            found = f"the payload begins at offset {self._payload}, and the file has {self.file.size} bytes"
            raise ImageError(image, f"LUKS header: {found}", 104)
        self.child_resized("file")
        passphrase = self._passphrase()
        if passphrase is not None:
            self._cipher = await luks.unlock(passphrase)

    def _passphrase(self) -> bytes | None:
        name = self.options.key_secret
        return self.node.objects.find(name, Secret).passphrase() if name is not None else None

    def child_resized(self, name: str) -> None:
        if self._luks is not None:
            self.size = max(round_down(self.file.size - self._payload, SECTOR_BYTES), 0)

    def check_permissions(self, held: Permission, shared: Permission) -> None:
        if self._cipher is None and held & ~Permission.RESIZE and self._luks is not None:
            raise PermissionConflict(f"{self.node.describe()} is encrypted; give its passphrase by key-secret")

    # --- the data path -------------------------------------------------------------------------------------

    def _unlocked(self, what: str) -> SectorCipher:
        if self._cipher is None:
            raise io_error(errno.ENOKEY, self.node.name, f"{what} without key-secret")
        return self._cipher

    async def read(self, offset: int, into: memoryview, flags: int) -> None:
        cipher = self._unlocked("read")
        await self.file.read(self._payload + offset, into, flags)
        for start, length in pieces(0, len(into), PIECE_BYTES):
            if start:
                await asyncio.sleep(0)
            cipher.decrypt((offset + start) // SECTOR_BYTES, into[start : start + length])

    async def write(self, offset: int, data: memoryview, flags: int) -> None:
        cipher = self._unlocked("write")
        if len(data) <= PIECE_BYTES:
            encrypted = cipher.encrypt(offset // SECTOR_BYTES, data)
            await self.file.write(self._payload + offset, memoryview(encrypted), flags)
            return
        for start, length in pieces(0, len(data), WRITE_BYTES):
            encrypted = await self._encrypted(cipher, offset + start, data[start : start + length])
            await self.file.write(self._payload + offset + start, memoryview(encrypted), flags)

    @staticmethod
    async def _encrypted(cipher: SectorCipher, offset: int, data: memoryview) -> bytearray:
        encrypted = bytearray()
        for start, length in pieces(0, len(data), PIECE_BYTES):
            encrypted += cipher.encrypt((offset + start) // SECTOR_BYTES, data[start : start + length])
            await asyncio.sleep(0)
        return encrypted

    # --- size and shape ------------------------------------------------------------------------------------

    async def truncate(self, size: int, preallocation: Preallocation, *, exact: bool) -> None:
        if size % SECTOR_BYTES:
            raise io_error(errno.EINVAL, self.node.name, f"resize to {size}, which is no multiple of {SECTOR_BYTES}")
        if size > MAX_SIZE_BYTES - self._payload:
            raise io_error(errno.EFBIG, self.node.name, f"resize to {size} behind a header of {self._payload} bytes")
        await self.file.node.truncate(self._payload + size, preallocation, exact=exact)

    async def info(self) -> ImageInfo:
        assert self._luks is not None
        return ImageInfo(encrypted=True, specific=self._luks.describe())

    async def amend(self, changes: Mapping[str, Any], progress: Progress = no_progress, *, force: bool = False) -> None:
        """Fill or erase key slots; see `LuksAmendOptions`, and `Amendable`."""
        assert self._luks is not None
        wanted = opt.convert(changes, LuksAmendOptions, driver=self.name)
        if self.node.read_only:
            raise io_error(errno.EROFS, self.node.name, "change of key slots")
        await self._luks.amend(wanted, self.node.objects, self._passphrase(), force=force)
        progress(1, 1)

    # --- new images ----------------------------------------------------------------------------------------

    @classmethod
    async def create_image(
        cls, file: BlockBackend, options: CreationOptions, *, data_file: BlockBackend | None = None
    ) -> None:
        assert isinstance(options, LuksCreationOptions)
        passphrase = creation_passphrase(options.key_secret, file.node.objects)
        container, size = options.container(), image_bytes(options.container(), options.size)
        if options.preallocation is Preallocation.METADATA:
            raise OptionError("preallocation: luks takes off, falloc and full; there is no metadata but the header")
        await file.truncate(size, options.preallocation)
        image = file.node.filename() or file.node.name
        await Luks.create(FileHeader(file), container, passphrase, image)

    @classmethod
    async def measure(cls, options: CreationOptions, source: BlockBackend | None) -> Measurement:
        """The size of the file that a new image takes; see `Measurable`."""
        assert isinstance(options, LuksCreationOptions)
        size = image_bytes(options.container(), options.size if source is None else source.size)
        return Measurement(required=size, fully_allocated=size)


def creation_passphrase(key_secret: str, objects: Objects) -> bytes:
    """The passphrase of a new image.

    Raises:
        OptionError: none was named, or there is no such secret.
    """
    if not key_secret:
        raise OptionError("key-secret: a new encrypted image needs a passphrase: --object secret,id=ID,file=PATH")
    return objects.find(key_secret, Secret).passphrase()


def image_bytes(options: LuksOptions, size: int) -> int:
    """How long the file of a new image is.

    Raises:
        OptionError: there is no such cipher, or the file would be too large.
    """
    total = header_bytes(options) + round_up(size, SECTOR_BYTES)
    if total > MAX_SIZE_BYTES:
        raise OptionError(f"size: {size} bytes behind a header are more than {MAX_SIZE_BYTES}")
    return total
