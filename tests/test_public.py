"""What `import everlong` promises: the names, and that nothing heavy is loaded with it."""

import subprocess
import sys

import pytest

import everlong


def python(code):
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)


def test_the_public_names():
    assert everlong.__all__ == ["LanguageModel", "ModelConfig", "__version__", "generate", "load"]
    for name in [*everlong.__all__, "mixers", "ops"]:
        assert getattr(everlong, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'lod'"):
        everlong.lod  # noqa: B018


def test_generate_is_called_wherever_it_was_imported_first():
    for first in ("import everlong.generate.sampling", "import everlong", "from everlong import generate"):
        done = python(f"{first}; import everlong; assert callable(everlong.generate), everlong.generate")
        assert done.returncode == 0, done.stderr


def test_imports_load_nothing_heavy():
    heavy = ["transformers", "datasets", "fastapi", "ray", "pandas", "pyarrow", "tyro", "rich", "torch._dynamo"]
    names = "everlong.LanguageModel; everlong.load; everlong.generate; everlong.ops"
    code = f"import everlong, sys; {names}; print([m for m in {heavy} if m in sys.modules])"
    done = python(code)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "[]"
