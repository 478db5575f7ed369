"""What `import balora` needs, who imports whom, and that the folder kernels/ shadows nobody."""

import ast
import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

# The table of modules: what each may import beside the standard library.
MAY_IMPORT = {
    "__init__": {
        "balora.attachment",
        "balora.config",
        "balora.dispatch",
        "balora.export",
        "balora.four_bit",
        "balora.functional",
        "balora.modeling",
        "balora.pissa",
        "balora.pretrained",
        "balora.quantized",
    },  # last: types
    "checks": {"torch"},
    "config": {"balora.checks"},
    "dispatch": {"torch", "balora"},
    "reference": {"torch"},
    "rows": {"torch"},
    "precision": {"torch"},
    "spectral": {"torch", "balora.precision"},
    "batch": {"torch", "balora.spectral"},
    "head": {"torch", "balora.checks", "balora.precision", "balora.spectral"},
    "operators": {"torch", "balora.checks", "balora.config", "balora.fused", "balora.head", "balora.streaming"},
    "fused": {
        "torch",
        "balora_kernels",
        "balora.batch",
        "balora.config",
        "balora.head",
        "balora.precision",
        "balora.spectral",
        "balora.streaming",
    },
    "streaming": {
        "torch",
        "balora.batch",
        "balora.config",
        "balora.head",
        "balora.precision",
        "balora.rows",
        "balora.spectral",
    },
    "losses": {
        "torch",
        "balora.batch",
        "balora.checks",
        "balora.config",
        "balora.dispatch",
        "balora.fused",
        "balora.operators",
        "balora.precision",
        "balora.reference",
        "balora.streaming",
    },
    "objective": {"torch", "balora.checks", "balora.config", "balora.losses"},
    "functional": {
        "torch",
        "balora.objective",
        "balora.checks",
        "balora.config",
        "balora.dispatch",
        "balora.fused",
        "balora.operators",
        "balora.head",
        "balora.losses",
        "balora.precision",
        "balora.reference",
        "balora.spectral",
        "balora.streaming",
    },
    "principal": {"torch", "balora.functional"},
    "four_bit": {"torch", "bitsandbytes"},
    "adapter_paths": {"torch"},
    "adapters": {
        "torch",
        "peft",
        "safetensors",
        "balora.adapter_paths",
        "balora.checkpoints",
        "balora.four_bit",
        "balora.sharding",
    },
    "sharding": {"torch", "transformers", "deepspeed"},
    "targets": {"torch", "transformers"},
    "pissa": {
        "torch",
        "peft",
        "tqdm",
        "balora.adapters",
        "balora.checks",
        "balora.four_bit",
        "balora.pretrained",
        "balora.principal",
        "balora.sharding",
        "balora.targets",
    },
    "checkpoints": {"safetensors"},
    "export": {"torch", "peft", "safetensors", "balora.adapters", "balora.checkpoints", "balora.sharding"},
    "quantized": {
        "torch",
        "peft",
        "safetensors",
        "tqdm",
        "transformers",
        "balora.adapters",
        "balora.checkpoints",
        "balora.four_bit",
        "balora.pissa",
        "balora.sources",
        "balora.targets",
    },
    "output_layer": {"torch", "peft", "balora.adapters", "balora.functional", "balora.pretrained", "balora.reference"},
    "attachment": {"torch", "balora.checks", "balora.config", "balora.output_layer"},
    "causal_lm": {
        "torch",
        "transformers",
        "balora.attachment",
        "balora.checks",
        "balora.config",
        "balora.functional",
        "balora.output_layer",
        "balora.pretrained",
        "balora.sharding",
    },
    "encoder_decoder": {
        "torch",
        "balora.attachment",
        "balora.causal_lm",
        "balora.checks",
        "balora.config",
        "balora.functional",
        "balora.output_layer",
        "balora.pretrained",
    },
    "sequence_classifier": {"torch", "balora.attachment", "balora.config", "balora.functional", "balora.pretrained"},
    "modeling": {
        "torch",
        "peft",
        "balora.adapters",
        "balora.attachment",
        "balora.causal_lm",
        "balora.checks",
        "balora.config",
        "balora.encoder_decoder",
        "balora.four_bit",
        "balora.output_layer",
        "balora.sequence_classifier",
        "balora.sharding",
    },
    "sources": {"datasets"},
    "tokenized": {"numpy", "balora.checks"},
    "data": {"numpy", "tqdm", "transformers", "balora.checks", "balora.sources", "balora.tokenized"},
    "classification": {"tqdm", "balora.sources", "balora.tokenized"},
    "seq2seq": {"tqdm", "balora.classification", "balora.data", "balora.sources", "balora.tokenized"},
    "metrics": {"numpy", "balora.checks"},
    "tasks": {
        "transformers",
        "balora.classification",
        "balora.data",
        "balora.metrics",
        "balora.pretrained",
        "balora.quantized",
        "balora.seq2seq",
        "balora.sharding",
        "balora.sources",
        "balora.tokenized",
    },
    "probe": {
        "torch",
        "balora.attachment",
        "balora.checks",
        "balora.config",
        "balora.functional",
        "balora.output_layer",
        "balora.pretrained",
        "balora.reference",
    },
    "plots": {"matplotlib", "numpy"},
    "elements": {"balora.plots"},
    "page": {"balora.config", "balora.elements", "balora.plots"},
    "report": {
        "numpy",
        "torch",
        "transformers",
        "psutil",
        "balora",
        "balora.attachment",
        "balora.dispatch",
        "balora.files",
        "balora.page",
        "balora.probe",
    },
    "trainer": {
        "torch",
        "transformers",
        "balora.adapters",
        "balora.attachment",
        "balora.functional",
        "balora.sharding",
    },
    "resume": {
        "transformers",
        "yaml",
        "balora.adapters",
        "balora.checkpoints",
        "balora.sources",
        "balora.tasks",
    },
    "train": {
        "torch",
        "transformers",
        "peft",
        "balora",
        "balora.adapters",
        "balora.attachment",
        "balora.config",
        "balora.export",
        "balora.modeling",
        "balora.pissa",
        "balora.quantized",
        "balora.resume",
        "balora.sharding",
        "balora.targets",
        "balora.tasks",
        "balora.tokenized",
        "balora.trainer",
    },
    "measure": {"torch", "sklearn", "balora.checks", "balora.functional"},
    "results": set(),
    "compare_run": {
        "torch",
        "transformers",
        "peft",
        "balora",
        "balora.files",
        "balora.measure",
        "balora.tasks",
        "balora.train",
    },
    "compare_page": {"balora.elements", "balora.plots", "balora.results"},
    "compare": {
        "tqdm",
        "yaml",
        "balora.compare_page",
        "balora.compare_run",
        "balora.files",
        "balora.quantized",
        "balora.results",
        "balora.sources",
    },
    "pretrained": {"peft", "torch", "balora.adapters"},
    "files": set(),
    "cli": {"transformers", "yaml", "balora", "balora.config", "balora_bench"},
}


def imports(path):
    """The modules that a file of balora imports: its own by full name, others by their top level."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name.partition(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            yield node.module.partition(".")[0]
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield f"balora.{node.module}"
        elif isinstance(node, ast.ImportFrom):
            for alias in node.names:
                is_module = (path.parent / f"{alias.name}.py").is_file()
                yield f"balora.{alias.name}" if is_module else "balora"


def test_every_module_imports_only_what_it_may():
    found = {path.stem: set(imports(path)) - sys.stdlib_module_names for path in (ROOT / "balora").glob("*.py")}
    assert found.keys() == MAY_IMPORT.keys()
    for module, names in found.items():
        assert names <= MAY_IMPORT[module], module


def test_the_kernels_know_nothing_of_balora():
    for path in (ROOT / "kernels").rglob("*.py"):
        own = {f"balora.{other.stem}" for other in path.parent.glob("*.py")}  # relative imports
        assert set(imports(path)) - sys.stdlib_module_names - own <= {"torch", "triton", "balora_kernels"}, path
    assert not (ROOT / "kernels" / "__init__.py").exists()


def python(code, **environment):
    return subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env={**os.environ, **environment}, capture_output=True, text=True
    )


HIDE = "import sys\nfor name in {hidden}: sys.modules[name] = None\n"


def test_import_balora_needs_only_torch():
    hidden = ["triton", "peft", "transformers", "accelerate", "datasets", "matplotlib", "safetensors", "yaml", "tqdm"]
    code = HIDE.format(hidden=hidden) + (
        "import balora, torch\n"
        "h = torch.randn(3, 4, requires_grad=True)\n"
        "head, labels = balora.LinearHead(torch.randn(9, 4)), torch.tensor([1, 2, -100])\n"
        "out = balora.functional.linear_objective(h, h, head, labels, balora.BALoraConfig())\n"
        "out.loss.backward()\n"
    )
    result = python(code)
    assert result.returncode == 0, result.stderr


def test_a_missing_package_gives_the_command_that_installs_it():
    code = (
        "import sys, importlib.abc\n"
        "class Hide(importlib.abc.MetaPathFinder):\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name.partition('.')[0] == hidden: raise ModuleNotFoundError(name, name=name)\n"
        "import balora\nsys.meta_path.insert(0, Hide())\n"
        "for hidden, name in [('peft', 'attach'), ('yaml', 'train')]:\n"
        "    try: getattr(balora, name)\n"
        "    except ImportError as error: print(error)\n"
    )
    lines = python(code).stdout.splitlines()  # others print there too
    assert "balora.modeling needs peft, which is not installed: pip install peft" in lines
    assert "balora.train needs yaml, which is not installed: pip install pyyaml" in lines


@pytest.mark.parametrize("installed", [False, True])
def test_transformers_and_the_folder_kernels_get_along(installed):
    """From the repository root, with and without Hugging Face's package of that name."""
    environment = {}
    if installed:
        site = Path(sys.prefix) / "with-kernels"  # `make test` puts the package there, apart from the others
        if not site.is_dir():
            pytest.skip(f"Hugging Face's kernels is not in {site}; `make test` installs it there")
        environment["PYTHONPATH"] = str(site)
    code = (
        "import transformers, balora\n"
        "from transformers import LlamaForCausalLM\n"
        "import kernels; print(kernels.__file__)\n"
    )
    result = python(code, **environment)
    assert result.returncode == 0, result.stderr
    assert ("with-kernels" in result.stdout) is installed


def test_the_names_that_are_told_can_be_had(monkeypatch):
    import balora

    assert {"attach", "functional", "trainer"} <= set(dir(balora))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "peft" else name)
    assert "functional" in dir(balora)
    assert not {"attach", "trainer"} & set(dir(balora))


def test_the_public_names_are_there():
    import balora

    for name in balora.__all__:
        assert getattr(balora, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        balora.nonsense  # noqa: B018
