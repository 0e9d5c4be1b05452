"""A program as a file: of torch.export, of AOTInductor, or ONNX."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Literal

import torch
from torch.export import Dim, ExportedProgram

from torchrec_pt.programs.encoders import Program

Format = Literal["pt2", "aoti", "onnx"]
SUFFIX: dict[Format, str] = {"pt2": ".pt2", "aoti": ".aoti.pt2", "onnx": ".onnx"}


def check_formats(formats: Sequence[str]) -> None:
    """Raises:
    ValueError: one that does not exist, or what it needs is not installed.
    """
    for format in formats:
        if format not in SUFFIX:
            raise ValueError(
                f'export_model: formats must be of {", ".join(SUFFIX)}, given "{format}"'
            )
    if "onnx" in formats and not (find_spec("onnx") and find_spec("onnxscript")):
        raise ValueError(
            "export_model: onnx needs the packages onnx and onnxscript, which are not installed; "
            'pip install "torchrec_pt[onnx]"'
        )
    if "aoti" in formats:
        from torch._inductor.cpp_builder import get_cpp_compiler  # takes its time
        from torch._inductor.exc import InvalidCxxCompiler

        try:
            get_cpp_compiler()
        except InvalidCxxCompiler:
            raise ValueError(
                "export_model: aoti needs a C++ compiler, none is found; install g++ or set CXX"
            ) from None


def trace(program: Program) -> ExportedProgram:
    """The program as a graph of torch's operators, for any sizes that its inputs name."""
    sizes: dict[str, int] = {}
    for port in program.inputs:
        for size in port.shape:
            if isinstance(size, str):
                sizes.setdefault(size, 3 + len(sizes))  # sizes that are equal would become one
    given = tuple(port.example(sizes) for port in program.inputs)
    dims = tuple(
        {i: Dim.DYNAMIC for i, size in enumerate(port.shape) if isinstance(size, str)}
        for port in program.inputs
    )
    with torch.no_grad(), _quiet():
        return torch.export.export(program.eval(), given, dynamic_shapes=(dims,), strict=False)


def write_program(
    program: Program, folder: Path, name: str, formats: Sequence[Format]
) -> list[Path]:
    """One file a format, named after the program.

    Raises:
        ValueError: a graph that ONNX cannot express.
    """
    traced = trace(program)
    paths = []
    for format in formats:
        path = folder / f"{name}{SUFFIX[format]}"
        with torch.no_grad(), _quiet():
            if format == "pt2":
                torch.export.save(traced, path)
            elif format == "aoti":
                torch._inductor.aoti_compile_and_package(traced, package_path=str(path))
            else:
                _write_onnx(program, traced, path)
        paths.append(path)
    return paths


def _write_onnx(program: Program, traced: ExportedProgram, path: Path) -> None:
    try:
        torch.onnx.export(
            traced,
            (),
            path,
            dynamo=True,
            external_data=False,
            input_names=[port.name for port in program.inputs],
            output_names=[program.output.name],
            verbose=False,
        )
    except torch.onnx.errors.OnnxExporterError as error:
        reason = str(error.__cause__ or error).splitlines()[0]
        raise ValueError(
            f"export_model: ONNX cannot express {path.stem}, {reason}; leave the format onnx out"
        ) from None


@contextmanager
def _quiet() -> Iterator[None]:
    """Without what the exporters tell of themselves."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)
