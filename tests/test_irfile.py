"""OpenVINO's XML as bytes: plain arithmetic is let through, everything else is refused by name."""

import pytest

from umiad import irfile
from umiad.errors import ModelFileError

CONSTANT = (
    '<layer id="1" type="Const" version="opset1"><data element_type="f32" offset="0" size="16"/></layer>'
)
RELU = '<layer id="2" type="ReLU" version="opset1"/>'
GOOD = (
    '<?xml version="1.0"?><net name="score" version="11"><layers>'
    f'<layer id="0" type="Parameter" version="opset1"><data shape="?,3,64,64"/></layer>{CONSTANT}'
    f'{RELU}<layer id="3" type="Result" version="opset1"/><layer id="4" type="Result" version="opset1"/></layers>'
    "<edges/><rt_info/></net>"
)
BILLION = '<!DOCTYPE net [<!ENTITY a "aaaaaaaaaa"><!ENTITY b "&a;&a;&a;&a;&a;&a;&a;&a;">]>'
FETCHED = '<!DOCTYPE net SYSTEM "file:///etc/passwd">'


def check(text, held=16):
    irfile.check(text.encode(), bytes(held), source="model.xml")


def test_a_plain_graph_passes():
    check(GOOD)


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ('"ReLU"', '"Loop"', "layer 'Loop'"),
        ('"ReLU"', '"ReadValue"', "layer 'ReadValue'"),
        ('"ReLU" version="opset1"', '"ReLU" version="extension"', "layer 'ReLU' of 'extension'"),
        ('"ReLU" version="opset1"', '"ReLU"', "layer 'ReLU' of ''"),
        ("<net ", BILLION + "<net ", "holds a declaration"),
        ("<net ", FETCHED + "<net ", "holds a declaration"),
        ("net ", "not ", "no XML"),
        ('size="16"', 'size="17"', "a constant at 0 of 17 bytes, but model.bin has 16"),
        ('offset="0"', 'offset="-8"', "a constant without offset and size"),
        ('size="16"', "", "a constant without offset and size"),
        (RELU, RELU.replace("/>", "><body/></layer>"), "within"),
        ("</net>", "", "no XML"),
        ('"Result"', '"ReLU"', "1 layers 'Result', expected 2"),
        ('"ReLU"', '"Parameter"', "2 layers 'Parameter', expected 1"),
    ],
)  # fmt: skip
def test_M6_what_no_export_holds_is_refused_by_name(old, new, words):
    assert old in GOOD
    with pytest.raises(ModelFileError) as caught:
        check(GOOD.replace(old, new, 1))
    assert words in str(caught.value)
    assert str(caught.value).startswith("model.xml: ")


@pytest.mark.parametrize(
    "content", [b"", b"\xff\xfe<net/>", b"PK\x03\x04", "<net/>".encode("utf-16"), b"<a/>", b"<net/>"]
)
def test_M6_bytes_that_are_no_graph_are_refused(content):
    with pytest.raises(ModelFileError, match=r"^model.xml: "):
        irfile.check(content, b"", source="model.xml")


def test_M6_more_layers_than_any_export_has_are_refused(monkeypatch):
    monkeypatch.setattr(irfile, "MAX_LAYERS", 2)
    with pytest.raises(ModelFileError, match="5 layers, expected 1 to 2"):
        check(GOOD)
