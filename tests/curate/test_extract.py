"""Bytes to text. Oracles: Python's codecs; pages by hand; Resiliparse called directly."""

import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from purelm.curate.document import Document, Drop, Raw
from purelm.curate.encoding import Decoded, declared_in, decoded
from purelm.curate.extract import MOST_ATTRIBUTES, MOST_DEPTH, Extraction, extract, text_of
from purelm.curate.read import records

pytest.importorskip("resiliparse")

# Encodings, and a sentence or two in a language that is written in them, of which they are detected too.
TEXTS = {
    "euc-jp shift_jis iso-2022-jp":
        "\u3053\u308c\u306f\u65e5\u672c\u8a9e\u306e\u6587\u7ae0\u3067\u3059\u3002\u6587\u5b57\u30b3\u30fc"
        "\u30c9\u306e\u5224\u5b9a\u3092\u8a66\u9a13\u3057\u3066\u3044\u307e\u3059\u3002\u30a6\u30a7\u30d6"
        "\u306e\u9801\u306f\u69d8\u3005\u306a\u7b26\u53f7\u3067\u66f8\u304b\u308c\u3066\u3044\u307e\u3059"
        "\u3002",
    "gbk gb18030 gb2312":
        "\u8fd9\u662f\u4e00\u4e2a\u4e2d\u6587\u7f51\u9875\uff0c\u7528\u6765\u6d4b\u8bd5\u7f16\u7801\u68c0"
        "\u6d4b\u3002\u7f51\u7edc\u4e0a\u7684\u9875\u9762\u4f7f\u7528\u5404\u79cd\u4e0d\u540c\u7684\u7f16"
        "\u7801\u65b9\u5f0f\u3002",
    "big5":
        "\u9019\u662f\u4e00\u500b\u4e2d\u6587\u7db2\u9801\uff0c\u7528\u4f86\u6e2c\u8a66\u7de8\u78bc\u3002"
        "\u7db2\u8def\u4e0a\u7684\u9801\u9762\u4f7f\u7528\u5404\u7a2e\u4e0d\u540c\u7684\u7de8\u78bc\u3002",
    "euc-kr cp949":
        "\uc774\uac83\uc740 \uc778\ucf54\ub529 \uac10\uc9c0\ub97c \uc2dc\ud5d8\ud558\uae30 \uc704\ud55c "
        "\ud55c\uad6d\uc5b4 \ubb38\uc7a5\uc785\ub2c8\ub2e4. \uc6f9 \ud398\uc774\uc9c0\ub294 \ub2e4\uc591"
        "\ud558\ub2e4.",
    "windows-1251 koi8-r iso-8859-5":
        "\u042d\u0442\u043e \u0440\u0443\u0441\u0441\u043a\u0438\u0439 \u0442\u0435\u043a\u0441\u0442 "
        "\u0434\u043b\u044f \u043f\u0440\u043e\u0432\u0435\u0440\u043a\u0438 \u043e\u043f\u0440\u0435"
        "\u0434\u0435\u043b\u0435\u043d\u0438\u044f \u043a\u043e\u0434\u0438\u0440\u043e\u0432\u043a"
        "\u0438 \u0441\u0442\u0440\u0430\u043d\u0438\u0446\u044b. \u041e\u043d \u0434\u043e\u0441\u0442"
        "\u0430\u0442\u043e\u0447\u043d\u043e \u0434\u043b\u0438\u043d\u043d\u044b\u0439.",
    "windows-1252":
        "C'est une page fran\xe7aise o\xf9 l'on v\xe9rifie les caract\xe8res accentu\xe9s, d\xe9j\xe0 tr"
        "\xe8s r\xe9pandus \xe0 l'\xe9poque.",
    "windows-1253 iso-8859-7":
        "\u0391\u03c5\u03c4\u03cc \u03b5\u03af\u03bd\u03b1\u03b9 \u03ad\u03bd\u03b1 \u03b5\u03bb\u03bb"
        "\u03b7\u03bd\u03b9\u03ba\u03cc \u03ba\u03b5\u03af\u03bc\u03b5\u03bd\u03bf \u03b3\u03b9\u03b1 "
        "\u03c4\u03b7 \u03b4\u03bf\u03ba\u03b9\u03bc\u03ae \u03c4\u03b7\u03c2 \u03ba\u03c9\u03b4\u03b9"
        "\u03ba\u03bf\u03c0\u03bf\u03af\u03b7\u03c3\u03b7\u03c2.",
    "windows-1255":
        "\u05d6\u05d4\u05d5 \u05d8\u05e7\u05e1\u05d8 \u05d1\u05e2\u05d1\u05e8\u05d9\u05ea \u05dc\u05d1"
        "\u05d3\u05d9\u05e7\u05ea \u05d6\u05d9\u05d4\u05d5\u05d9 \u05d4\u05e7\u05d9\u05d3\u05d5\u05d3 "
        "\u05e9\u05dc \u05d4\u05d3\u05e3.",
    "windows-1256":
        "\u0647\u0630\u0627 \u0646\u0635 \u0639\u0631\u0628\u064a \u0644\u0627\u062e\u062a\u0628\u0627"
        "\u0631 \u0643\u0634\u0641 \u062a\u0631\u0645\u064a\u0632 \u0627\u0644\u0635\u0641\u062d\u0629 "
        "\u0639\u0644\u0649 \u0627\u0644\u0648\u064a\u0628.",
    "windows-1254":
        "Bu sayfa T\xfcrk\xe7e karakterlerin do\u011fru alg\u0131lan\u0131p alg\u0131lanmad\u0131\u011f"
        "\u0131n\u0131 s\u0131namak i\xe7indir: \u011f\xfc\u015f\xf6\xe7\u0131.",
    "tis-620":
        "\u0e19\u0e35\u0e48\u0e04\u0e37\u0e2d\u0e02\u0e49\u0e2d\u0e04\u0e27\u0e32\u0e21\u0e20\u0e32\u0e29"
        "\u0e32\u0e44\u0e17\u0e22\u0e2a\u0e33\u0e2b\u0e23\u0e31\u0e1a\u0e17\u0e14\u0e2a\u0e2d\u0e1a\u0e01"
        "\u0e32\u0e23\u0e40\u0e02\u0e49\u0e32\u0e23\u0e2b\u0e31\u0e2a",
}  # fmt: skip
CASES = [(text * 3, name) for names, text in TEXTS.items() for name in names.split()]


@pytest.mark.parametrize(("text", "name"), CASES, ids=[name for _, name in CASES])
def test_encodings(text, name):
    """Declared by HTTP, by meta, by meta against a server's latin-1, wrongly as UTF-8, and not at all."""
    content = text.encode(name)
    meta = b"<meta charset='%s'>" % name.encode()
    assert decoded(content, name.upper())[::2] == (text, 0)
    assert decoded(meta + content).text == decoded(meta + content, "ISO-8859-1").text == meta.decode() + text
    assert decoded(content).text == decoded(content, "utf-8").text == decoded(content, "no-such").text == text
    assert decoded(text.encode(), name) == Decoded(text, "utf-8", 0)  # declared, but it is UTF-8
    html = b"<html><head>" + meta + b"</head><body><p>" + content
    assert extract(Raw("1", html, content_type="text/html"), Extraction()).text == text


def test_byte_order_marks():
    for name in ("utf-8-sig", "utf-16"):
        assert decoded("n\xe9".encode(name), "windows-1251")[::2] == ("n\xe9", 0)
    assert decoded(b"\xfe\xff\0n\0\xe9").text == "n\xe9" == decoded(b"n\0\xe9\0", "utf-16").text
    for name in ("utf-16-le", "utf-16-be"):
        for charset in ("", name, "utf-8", "latin1"):
            assert decoded("<p>plain n\xe9".encode(name), charset)[:2] == ("<p>plain n\xe9", name)
    assert decoded("<p>a stray \0 n\xe9".encode()) == Decoded("<p>a stray \0 n\xe9", "utf-8", 0)
    assert decoded(b"\xff\xfea\0b") == Decoded("a\ufffd", "utf-16-le", 1)


@pytest.mark.parametrize(
    ("head", "name"),
    [
        (b'<meta charset="GBK">', "gbk"), (b"<META CHARSET = euc-jp />", "euc-jp"), (b"<meta name=x>", ""),
        (b'<meta http-equiv="Content-Type" content="text/html; charset=windows-1251">', "windows-1251"),
        (b'<?xml version="1.0" encoding="koi8-r"?>', "koi8-r"), (b" " * 5000 + b'<meta charset="gbk">', ""),
        (b"charset=gbk", ""),
    ],
)  # fmt: skip
def test_declared_in(head, name):
    assert declared_in(b"<html>" + head) == name


def test_what_does_not_fit():
    """Cut in a character: one U+FFFD. Latin-1 called UTF-8: its accents. Names that are no encodings of text: none."""
    assert decoded("\xe9".encode() * 99 + b"\xc3", "utf-8") == Decoded("\xe9" * 99 + "\ufffd", "utf-8", 1)
    assert decoded("d\xe9j\xe0 vu \xe0 l'\xe9poque, tr\xe8s r\xe9pandu".encode("cp1252"), "utf-8").text.startswith(
        "d\xe9j\xe0 vu"
    )
    assert decoded(b"caf\xe9 au lait", "utf-8").text == "caf\xe9 au lait"
    for name in (
        "hex",
        "rot13",
        "idna",
        "utf-7",
        "unicode_escape",
        "undefined",
        "\0",
        "\xe9",
        "x" * 999,
        "replacement",
    ):
        assert decoded(b"caf+AOk- \\u0041 41", name).text == "caf+AOk- \\u0041 41"
        decoded(b"\xff\x80", name)


@settings(max_examples=150)
@given(st.binary(max_size=80), st.sampled_from(["", "utf-8", "gbk", "euc-jp", "utf-16", "iso-2022-jp", "hz", "big5"]))
def test_any_bytes_have_a_text(content, charset):
    text, name, replaced = decoded(content, charset)
    text.encode()  # no lone surrogates
    assert replaced == text.count("\ufffd") and "".encode(name) is not None


@given(st.text())
def test_utf8_is_itself(text):
    """Whatever is declared; a mark at its head is taken off; with many NULs or escapes other rules hold."""
    text = text.replace("\0", "").replace("\x1b$", "")
    assert decoded(text.encode(), "euc-jp") == Decoded(text.removeprefix("\ufeff"), "utf-8", 0)


PAGE = """<html><head><title>T</title><style>a{}</style></head><body><nav>Menu</nav><h1>Head</h1>
<p>One  <b>two</b>&amp;&eacute;&#0;&#7;</p><ul><li>x</ul><script>y</script><footer>Foot</footer></body></html>"""


def of(content, content_type="text/html", **options):
    return extract(Raw("1", content, "http://a.b/", content_type, meta={"date": "d"}), Extraction(**options))


def test_a_page():
    whole = of(PAGE.encode())
    assert whole == Document("1", "Menu\n\nHead\n\nOne two&\xe9\ufffd\n\n  \u2022 x\nFoot", "http://a.b/", whole.meta)
    assert whole.meta == {"date": "d", "encoding": "utf-8"}
    main = of(PAGE.encode(), main_content=True).text
    assert "One two&\xe9" in main and "Menu" not in main and "Foot" not in main
    from resiliparse.extract.html2text import extract_plain_text

    assert text_of(PAGE) == extract_plain_text(PAGE)


def test_nuls_and_controls_are_taken_out():
    assert of(b"<p>a\0b\x01c\x7f\td\x1b[0m\r\ne").text == "abc d[0m e"
    assert of(b"a\0b\n\x07c", "text/plain", plain_text=True).text == "ab\nc"


def test_drops():
    assert of(b"<p>" + b"a" * 99, most_bytes=50) == Drop("too large", 102)
    assert of(b"x", "image/png") == Drop("not HTML", "image/png")
    assert (
        of(b"x", "text/plain") == Drop("not HTML", "text/plain") and of(b"x", "text/plain", plain_text=True).text == "x"
    )
    assert of(b"\x89PNG\r\n\0\0", "") == Drop("not HTML", "binary") and of(b"<p>x", "").text == "x"
    assert of("n\xe9".encode("utf-16"), "").text == "n\xe9"
    assert of(b"<p> <br>") == of(b"") == Drop("no text")
    bad = of(b"\xef\xbb\xbf" + b"ab\xff\xff", most_replaced=0.4)
    assert bad == Drop("undecodable", 0.5) and isinstance(
        of(b"\xef\xbb\xbf" + b"ab\xff\xff", most_replaced=0.5), Document
    )
    attributes = b"<p " + b" ".join(b"a%d=1" % i for i in range(MOST_ATTRIBUTES + 1)) + b">x"
    assert of(attributes) == Drop("too many attributes", MOST_ATTRIBUTES + 1)
    deep = b"<div>" * (MOST_DEPTH + 1) + b"x"
    assert of(deep, main_content=True) == Drop("nested too deeply", MOST_DEPTH + 1) and of(deep).text == "x"
    flat = (b"<DIV>y</DIV>" * MOST_DEPTH) + b"<div>" * MOST_DEPTH + b"x"
    assert isinstance(of(flat, main_content=True), Document)
    for wrong in ({"most_bytes": 0}, {"most_replaced": 1.5}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            Extraction(**wrong)


TAGS = "<p> </p> <div> </div> <table> <tr> <td> <b> <a href= <!-- --> <script> </script> <svg> <![CDATA[ &#x &amp <meta charset=gbk> < > \" ' \0 \xe9".split(" ")  # fmt: skip  # noqa: E501


@settings(max_examples=150)
@given(st.lists(st.sampled_from([*TAGS, "text ", "\n"]) | st.text(max_size=5), max_size=40), st.booleans())
def test_any_page_has_a_text_or_a_reason(parts, main):
    content = "".join(parts).encode("utf-8", "surrogatepass")
    found = of(content, main_content=main)
    assert isinstance(found, Drop) or (found.text.strip() and "\0" not in found.text and found.text.encode())


@given(st.binary(max_size=200))
def test_any_bytes_have_a_document_or_a_reason(content):
    assert isinstance(of(content), Document | Drop)


def test_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "resiliparse.extract.html2text", None)
    with pytest.raises(ModuleNotFoundError, match=r"resiliparse: pip install 'purelm\[curate\]'"):
        text_of("x")


def test_real_pages(shared_data):
    """The seven crawls: 98 pages of HTML or so, each a text or a reason, GBK and windows-1251 among them."""
    files = sorted((shared_data / "warc").glob("*.warc.gz"))
    if not files:
        pytest.skip(f"no crawls in {shared_data / 'warc'}")
    pages = [x for file in files for x in records(file) if isinstance(x, Raw) and x.content_type == "text/html"]
    found = [extract(page, Extraction()) for page in pages]
    names = {x.meta["encoding"] for x in found if isinstance(x, Document)}
    assert len(pages) > 80 and {"utf-8", "gb18030", "cp1251"} <= names
    assert sum(isinstance(x, Document) for x in found) > 0.9 * len(pages)
    assert all("\ufffd" not in x.text[:200] for x in found if isinstance(x, Document))
