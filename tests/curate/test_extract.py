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

# A few sentences each, of which the encodings are detected too, and the names that count as right.
TEXTS = {
    "これは日本語の文章です。文字コードの判定を試験しています。ウェブの頁は様々な符号で書かれています。":
        "euc-jp shift_jis iso-2022-jp",
    "这是一个中文网页，用来测试编码检测。网络上的页面使用各种不同的编码方式。":
        "gbk gb18030 gb2312",
    "這是一個中文網頁，用來測試編碼。網路上的頁面使用各種不同的編碼。":
        "big5",
    "이것은 인코딩 감지를 시험하기 위한 한국어 문장입니다. 웹 페이지는 다양하다.":
        "euc-kr cp949",
    "Это русский текст для проверки определения кодировки страницы. Он достаточно длинный.":
        "windows-1251 koi8-r iso-8859-5",
    "C'est une page française où l'on vérifie les caractères accentués, déjà très répandus à l'époque.":
        "windows-1252",
    "Αυτό είναι ένα ελληνικό κείμενο για τη δοκιμή της κωδικοποίησης.":
        "windows-1253 iso-8859-7",
    "זהו טקסט בעברית לבדיקת זיהוי הקידוד של הדף.":
        "windows-1255",
    "هذا نص عربي لاختبار كشف ترميز الصفحة على الويب.":
        "windows-1256",
    "Bu sayfa Türkçe karakterlerin doğru algılanıp algılanmadığını sınamak içindir: ğüşöçı.":
        "windows-1254",
    "นี่คือข้อความภาษาไทยสำหรับทดสอบการเข้ารหัส":
        "tis-620",
}  # fmt: skip
CASES = [(text * 3, name) for text, names in TEXTS.items() for name in names.split()]


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
    assert extract(Extraction(), Raw("1", html, content_type="text/html")).text == text


def test_byte_order_marks():
    for name in ("utf-8-sig", "utf-16"):
        assert decoded("né".encode(name), "windows-1251")[::2] == ("né", 0)
    assert decoded(b"\xfe\xff\0n\0\xe9").text == "né" == decoded(b"n\0\xe9\0", "utf-16").text
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
    assert decoded("é".encode() * 99 + b"\xc3", "utf-8") == Decoded("é" * 99 + "\ufffd", "utf-8", 1)
    assert decoded("déjà vu à l'époque, très répandu".encode("cp1252"), "utf-8").text.startswith("déjà vu")
    for name in ("hex", "rot13", "idna", "utf-7", "unicode_escape", "undefined", "\0", "é", "x" * 999, "replacement"):
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
    return extract(Extraction(**options), Raw("1", content, "http://a.b/", content_type, meta={"date": "d"}))


def test_a_page():
    whole = of(PAGE.encode())
    assert whole == Document("1", "Menu\n\nHead\n\nOne two&é\ufffd\n\n  • x\nFoot", "http://a.b/", whole.meta)
    assert whole.meta == {"date": "d", "encoding": "utf-8"}
    main = of(PAGE.encode(), main_content=True).text
    assert "One two&é" in main and "Menu" not in main and "Foot" not in main
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
    assert of("né".encode("utf-16"), "").text == "né"
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


TAGS = "<p> </p> <div> </div> <table> <tr> <td> <b> <a href= <!-- --> <script> </script> <svg> <![CDATA[ &#x &amp <meta charset=gbk> < > \" ' \0 é".split(" ")  # fmt: skip  # noqa: E501


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
    found = [extract(Extraction(), page) for page in pages]
    names = {x.meta["encoding"] for x in found if isinstance(x, Document)}
    assert len(pages) > 80 and {"utf-8", "gb18030", "cp1251"} <= names
    assert sum(isinstance(x, Document) for x in found) > 0.9 * len(pages)
    assert all("\ufffd" not in x.text[:200] for x in found if isinstance(x, Document))
