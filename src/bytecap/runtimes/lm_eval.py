"""Let lm-evaluation-harness score a `.bcap` file, by its own loader of transformers' models.

The harness finds models in a registry of its own and loads no plug-ins (0.4.13), so this module registers the name
`bytecap` and then runs the harness's command line with the words that it was given::

    python -m bytecap.runtimes.lm_eval run --model bytecap --model_args pretrained=model.bcap --tasks ...

A file is laid out as a directory for transformers (`bytecap.runtimes.hub`) for the time of loading, so that every other
model argument (`dtype`, `batch_size`, `device`, `peft`) means what it means for the model type `hf`, and scores are
those of the unpacked directory. A directory in that layout and a hub id are taken as they are. `resident=coded` keeps
weights coded in memory.
"""

from __future__ import annotations

import sys
import tempfile
import warnings
from pathlib import Path
from typing import Any

from lm_eval.api.registry import register_model
from lm_eval.models.huggingface import HFLM

from bytecap.errors import BytecapError, UsageError
from bytecap.escape import shown
from bytecap.format import updates
from bytecap.format.decoder import side_files
from bytecap.runtimes import hub
from bytecap.runtimes.transformers import BytecapConfig


@register_model("bytecap")
class BytecapLM(HFLM):  # type: ignore[misc]
    """A model in a `.bcap` file, a directory that holds one, or a hub repository that does."""

    def __init__(self, pretrained: str | Path, resident: str = "decoded", **options: Any) -> None:
        self._resident = resident
        if not isinstance(pretrained, str | Path):
            raise UsageError("give pretrained=FILE.bcap, a directory with one, or a hub id; for a live model use hf")
        path = Path(pretrained)
        if not path.is_file():
            super().__init__(pretrained=str(pretrained), **options)
            return
        with tempfile.TemporaryDirectory(prefix="bytecap-") as directory:
            contents = updates.read(path)
            for name, data in hub.layout(contents, side_files(contents)).items():
                (Path(directory) / name).write_bytes(data)
            super().__init__(pretrained=directory, **options)
        self.pretrained = str(pretrained)

    def _create_model(self, *given: Any, **options: Any) -> None:
        """Load the model with weights coded or decoded, as was asked for."""
        if options.get("quantization_config") is not None or self._resident != "decoded":  # else an ordinary directory
            options["quantization_config"] = BytecapConfig(resident=self._resident)
        with warnings.catch_warnings():  # transformers says of every config that it takes such an option from us
            warnings.filterwarnings("ignore", "You passed `quantization_config`", UserWarning)
            super()._create_model(*given, **options)


def main() -> None:
    """Run the command line of the harness; our errors are one line."""
    from lm_eval.__main__ import cli_evaluate

    try:
        cli_evaluate()
    except BytecapError as exc:
        sys.stderr.write(f"error: {shown(str(exc))}\n")
        raise SystemExit(2) from exc


if __name__ == "__main__":
    main()
