"""The commands of the group `kernels`."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, Field

from synapse.commands import IN_PROCESS, Argument, Call, Context, LocalPath, command
from synapse.config import Settings
from synapse.errors import InvalidInput, NotFound
from synapse.kernels.cache import (
    FOLDER,
    KernelBuild,
    KernelSpec,
    build_kernel,
    build_prebuilt,
    build_standalone,
    check_build,
    find_build,
    kernel_specs,
)


class BuildKernels(BaseModel):
    """What to build, and how."""

    names: Annotated[list[str], Argument()] = Field(default=[], description="kernels; all of them when none is named")
    strict: bool = Field(False, description="compile also what is built, and count a warning as an error")
    # Without an output, the next two write into the folder that Synapse was started in.
    standalone: Annotated[str | None, LocalPath()] = Field(
        None, description="instead, make a program of its own from this kernel"
    )
    cpu: Annotated[str | None, LocalPath()] = Field(
        None, description="instead, build libraries for another CPU, such as x86-64-v3"
    )
    output: Annotated[Path | None, LocalPath()] = Field(
        None, description="the file of --standalone (by default its name, here), or the folder of --cpu"
    )


class ListKernels(BaseModel):
    """Nothing to choose."""


class VerifyKernels(BaseModel):
    """What to verify."""

    names: Annotated[list[str], Argument()] = Field(default=[], description="kernels; all of them when none is named")


class KernelRow(BaseModel):
    """One kernel."""

    name: str
    status: Literal["built", "prebuilt", "verified", "standalone", "missing"]
    build: str = Field(description="the first digits of the build's id")
    size_bytes: int
    path: str


class KernelRows(BaseModel):
    """Kernels, by name."""

    items: list[KernelRow]


@command("kernels/build", permission="manage")
async def build(params: BuildKernels, context: Context, call: Call = IN_PROCESS) -> KernelRows:
    """Compile the native kernels for this CPU, check them, and keep them.

    What is built already is left alone. Needs the Mojo compiler: pip install 'synapse[native]'.
    """
    if params.standalone is not None:
        spec = _specs([params.standalone])[0]
        program = await asyncio.to_thread(build_standalone, spec, (params.output or Path(spec.name)).absolute())
        row = KernelRow(
            name=spec.name, status="standalone", build="", size_bytes=program.stat().st_size, path=str(program)
        )
        return KernelRows(items=[row])
    if params.output is not None and params.cpu is None:
        raise InvalidInput("--output goes with --standalone or --cpu", hint="the cache's folder cannot be chosen")
    specs = _specs(params.names)
    folder = context.settings.folder(FOLDER)
    done = 0
    call.progress("building kernels", done, len(specs))

    async def one(spec: KernelSpec) -> KernelBuild:
        nonlocal done
        if params.cpu is not None:
            made = await asyncio.to_thread(build_prebuilt, spec, (params.output or Path()).absolute(), params.cpu)
        else:
            made = await asyncio.to_thread(build_kernel, spec, folder, strict=params.strict)
        done += 1
        call.progress("building kernels", done, len(specs))
        return made

    builds = await asyncio.gather(*(one(spec) for spec in specs))
    return KernelRows(items=[_row(made, "built" if params.cpu is None else "prebuilt") for made in builds])


@command("kernels/list", permission="read")
async def list_kernels(params: ListKernels, context: Context) -> KernelRows:
    """List the native kernels, and which library each would use."""
    rows = []
    for spec in _specs([]):
        found = find_build(spec, context.settings)
        if found is None:
            rows.append(KernelRow(name=spec.name, status="missing", build="", size_bytes=0, path=""))
        else:
            rows.append(_row(found, _origin(found, context.settings)))
    return KernelRows(items=rows)


@command("kernels/verify", permission="read")
async def verify(params: VerifyKernels, context: Context) -> KernelRows:
    """Check the libraries in use: checksum, machine, symbols, CPU, self-test. Fails at the first refused."""
    rows = []
    for spec in _specs(params.names):
        found = find_build(spec, context.settings)
        if found is None:
            raise NotFound(f"the kernel {spec.name} is not built", hint=f"synapse kernels build {spec.name}")
        await asyncio.to_thread(check_build, spec, found, context.settings.folder(FOLDER))
        rows.append(_row(found, "verified"))
    return KernelRows(items=rows)


def _specs(names: list[str]) -> list[KernelSpec]:
    specs = kernel_specs()
    for name in names:
        if name not in specs:
            raise NotFound(f"there is no kernel {name!r}", hint=f"the kernels are {', '.join(sorted(specs))}")
    return [specs[name] for name in names or sorted(specs)]


def _origin(found: KernelBuild, settings: Settings) -> Literal["built", "prebuilt"]:
    return "built" if found.path.parent == settings.home / FOLDER else "prebuilt"


def _row(found: KernelBuild, status: Literal["built", "prebuilt", "verified"]) -> KernelRow:
    return KernelRow(
        name=found.name,
        status=status,
        build=found.build_id[:12],
        size_bytes=found.path.stat().st_size,
        path=str(found.path),
    )
