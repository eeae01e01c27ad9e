"""A search of the source: nothing in it can execute what it reads from a file (M1); ONNX has one door (M6)."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FORBIDDEN_MODULES = {
    "pickle",
    "cPickle",
    "_pickle",
    "cloudpickle",
    "dill",
    "joblib",
    "shelve",
    "marshal",
    "dbm",
}
FORBIDDEN_MODULES |= {"onnx", "onnxruntime", "onnx2torch", "yaml", "jsonpickle"}
FORBIDDEN_NAMES = {"eval", "exec", "compile", "__import__"}
FORBIDDEN_CALLS = {
    "torch.load",
    "torch.jit.load",
    "torch.hub.load",
    "torch.hub.load_state_dict_from_url",
    "torch.package",
    "torch.onnx",
    "torch.compile",
    "os.system",
    "os.popen",
    "yaml.load",
    "extractall",
    "load_from_checkpoint",
}
FORBIDDEN_KEYWORDS = {"allow_pickle": True, "shell": True, "weights_only": False}
FILES = sorted((ROOT / "src").rglob("*.py"))


def dotted(node):
    """ "a.b.c" of an attribute chain, and what can be told of others."""
    if isinstance(node, ast.Attribute):
        return f"{dotted(node.value)}.{node.attr}"
    return node.id if isinstance(node, ast.Name) else ""


def imported(node):
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    if isinstance(node, ast.ImportFrom) and not node.level:
        return [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
    return []


def problems(text):
    """What a source text may not say, as (line, words)."""
    for node in ast.walk(ast.parse(text)):
        for name in imported(node):
            if name.split(".")[0] in FORBIDDEN_MODULES or name in FORBIDDEN_CALLS:
                yield node.lineno, f"import {name}"
        if isinstance(node, ast.Name) and node.id in FORBIDDEN_NAMES:
            yield node.lineno, node.id
        if isinstance(node, ast.Attribute):
            full = dotted(node)
            if full in FORBIDDEN_CALLS or node.attr in FORBIDDEN_CALLS:
                yield node.lineno, full
        if isinstance(node, ast.Call):
            for word in node.keywords:
                allowed = isinstance(
                    word.value, ast.Constant
                ) and word.value.value is not FORBIDDEN_KEYWORDS.get(word.arg)
                if word.arg in FORBIDDEN_KEYWORDS and not allowed:
                    yield node.lineno, f"{word.arg}="


def test_M1_M6_the_source_has_no_way_to_execute_what_it_reads():
    found = {
        (path.relative_to(ROOT).as_posix(), words)
        for path in FILES
        for _, words in problems(path.read_text(encoding="utf-8"))
    }
    assert found == {
        ("src/umiad/weights.py", "torch.load"),
        ("src/umiad/export/trace.py", "torch.onnx"),  # writes, and reads nothing
        (
            "src/umiad/export/quantise.py",
            "import onnxruntime",
        ),  # changes a graph that was made and checked here
        ("src/umiad/export/quantise.py", "import onnxruntime.quantization"),
    }
    assert len(FILES) > 50


def test_M6_graphs_are_read_in_one_place_and_checked_before_a_runtime_sees_them():
    packages, starts = set(), []
    for path in FILES:
        tree = ast.parse(path.read_text(encoding="utf-8"))
        name = path.relative_to(ROOT / "src" / "umiad").as_posix()
        for node in ast.walk(tree):
            if not isinstance(node, ast.Call):
                continue
            first = node.args[0].value if node.args and isinstance(node.args[0], ast.Constant) else None
            if dotted(node.func) == "require" and first in {"onnx", "onnxruntime", "openvino"}:
                packages.add((name, first))
            if dotted(node.func).endswith(("InferenceSession", "compile_model")):
                starts.append(name)
    assert packages == {
        ("onnxfile.py", "onnx"),
        ("runtimes.py", "onnxruntime"),
        ("runtimes.py", "openvino"),
        ("export/trace.py", "onnx"),  # the graph that it has traced
        ("export/trace.py", "openvino"),  # takes the graph that was just traced and checked
        ("export/quantise.py", "onnx"),  # the same graph, in 8 bits, checked again
        ("export/quantise.py", "onnxruntime"),
    }
    assert starts == ["runtimes.py", "runtimes.py"]
    start = (ROOT / "src" / "umiad" / "runtimes.py").read_text(encoding="utf-8").partition("def start(")[2]
    assert start.index("onnxfile.check(") < start.index("_onnx(")
    assert start.index("irfile.check(") < start.index("_openvino(")


def test_M1_the_one_torch_load_reads_only_what_has_the_pinned_hash():
    tree = ast.parse((ROOT / "src" / "umiad" / "weights.py").read_text(encoding="utf-8"))
    guards = [
        node
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and any("torch.load" in ast.unparse(each) for each in node.body)
    ]
    assert [ast.unparse(node.test) for node in guards] == [
        "hashlib.sha256(content).hexdigest() == IMAGENET.sha256"
    ]
    (call,) = (n for n in ast.walk(tree) if isinstance(n, ast.Call) and dotted(n.func) == "torch.load")
    assert ast.unparse(call) == "torch.load(io.BytesIO(content), map_location='cpu', weights_only=True)"


@pytest.mark.parametrize(
    "text",
    [
        "import pickle",
        "from joblib import load",
        "import torch; torch.load('x')",
        "from torch import load",
        "torch.jit.load('x')",
        "loader = torch.load",
        "eval('1')",
        "exec('1')",
        "numpy.load('x', allow_pickle=True)",
        "numpy.load('x', allow_pickle=flag)",
        "archive.extractall()",
        "subprocess.run('x', shell=True)",
        "yaml.load('x')",
        "import shelve",
        "import marshal, dill",
        "torch.load('x', weights_only=False)",
        "import onnx",
        "from onnxruntime import InferenceSession",
    ],
)
def test_M1_the_search_finds_what_it_is_for(text):
    assert list(problems(text))


def test_M1_the_search_lets_harmless_words_pass():
    text = "module.eval(); np.load(f, allow_pickle=False); re.compile('x'); run(c, shell=False); np.load(f)"
    assert not list(problems(text))
