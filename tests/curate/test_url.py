"""Hosts, domains and filters. Oracles: cases by hand; of domains, publicsuffix.org's own test cases."""

import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from purelm.curate import url as module
from purelm.curate.document import Document, Drop
from purelm.curate.url import UrlFilter, host_of, keep_url, registered_domain, word_list

pytest.importorskip("publicsuffixlist")


@pytest.mark.parametrize(
    ("url", "host"),
    [
        ("http://www.bbc.co.uk/x?y#z", "www.bbc.co.uk"), ("HTTPS://me:pw@Host.COM.:8080", "host.com"),
        ("foo.com/bar", "foo.com"), ("foo.com:80", "foo.com"), ("//cdn.x.com/a", "cdn.x.com"), (" http://a.b ", "a.b"),
        ("http://1.2.3.4:80/", "1.2.3.4"), ("http://[2001:DB8::1]:80/", "2001:db8::1"), ("ftp://x.org", "x.org"),
        ("http://b\u00fccher.de/", "xn--bcher-kva.de"), ("http://\u043f.\u0440\u0444/", "xn--o1a.xn--p1ai"),
        ("", ""), ("http://", ""), ("http://[bad", ""), ("mailto:me@x.com", ""), ("javascript:void(0)", ""),
        ("/path", ""), ("two words", ""), ("urn:uuid:1", ""),
    ],
)  # fmt: skip
def test_hosts(url, host):
    assert host_of(url) == host


@given(st.text(max_size=30), st.sampled_from(["", "http://", "//"]))
def test_any_string_has_a_host_or_none(text, start):
    host = host_of(start + text)
    assert host == host.lower() and isinstance(registered_domain(host), str)


# From publicsuffix.org's test_psl.txt, which is in the public domain.
PSL = """com - | example.com example.com | b.example.com example.com | a.b.example.com example.com | example - |
example.example example.example | biz - | domain.biz domain.biz | a.b.domain.biz domain.biz | uk.com - |
example.uk.com example.uk.com | a.b.example.uk.com example.uk.com | test.ac test.ac | mm - | c.mm - | b.c.mm b.c.mm |
a.b.c.mm b.c.mm | jp - | test.jp test.jp | ac.jp - | test.ac.jp test.ac.jp | kyoto.jp - | test.kyoto.jp test.kyoto.jp |
ide.kyoto.jp - | b.ide.kyoto.jp b.ide.kyoto.jp | c.kobe.jp - | b.c.kobe.jp b.c.kobe.jp | city.kobe.jp city.kobe.jp |
www.city.kobe.jp city.kobe.jp | ck - | test.ck - | b.test.ck b.test.ck | www.ck www.ck | www.www.ck www.ck |
us - | test.us test.us | ak.us - | test.ak.us test.ak.us | k12.ak.us - | test.k12.ak.us test.k12.ak.us |
xn--85x722f.com.cn xn--85x722f.com.cn | www.xn--85x722f.xn--55qx5d.cn xn--85x722f.xn--55qx5d.cn"""


@pytest.mark.parametrize("case", [line.strip() for line in PSL.replace("\n", " ").split("|")])
def test_domains(case):
    host, domain = case.split()
    assert registered_domain(host) == ("" if domain == "-" else domain)


def test_domains_of_addresses():
    found = [
        registered_domain(host) for host in ("1.2.3.4", "2001:db8::1", "localhost", "", "a.b.github.io", "A.B.CoM.")
    ]
    assert found == ["1.2.3.4", "2001:db8::1", "", "", "b.github.io", "b.com"]


FILTER = UrlFilter(
    domains=["Bad.org", "x.co.uk"],
    urls=["http://a.b/c"],
    strict=["sexcam"],
    hard=["porn"],
    soft=["hot", "girl", "webcam"],
)  # fmt: skip


@pytest.mark.parametrize(
    ("url", "drop"),
    [
        ("http://bad.org/", ("domain", "bad.org")), ("https://WWW.Bad.org:80/x", ("domain", "bad.org")),
        ("http://notbad.org/", None), ("http://bad.org.uk/", None), ("http://co.uk/", None),
        ("http://y.x.co.uk", ("domain", "x.co.uk")),
        ("http://a.b/c", ("url", "http://a.b/c")), ("http://a.b/c/d", None),
        ("http://my-sex-cam.com", ("strict word", "sexcam")), ("http://a.com/Sexcams1", ("strict word", "sexcam")),
        ("http://a.com/free_PORN.html", ("hard word", "porn")), ("http://a.com/pornography", None),
        ("http://a.com/hot", None), ("http://a.com/hot-hot", None), ("", None),
        ("http://hot.com/girl", ("soft words", 2)),
    ],
)  # fmt: skip
def test_filter(url, drop):
    document = Document("1", "text", url)
    assert keep_url(document, FILTER) == (document if drop is None else Drop(*drop))
    assert keep_url(document, UrlFilter()) == document


def test_soft_words_by_number():
    document = Document("1", "", "http://a.com/hot/girl/webcam")
    outcomes = [keep_url(document, UrlFilter(soft=FILTER.soft, most_soft=n)) for n in range(4)]
    assert outcomes == [Drop("soft words", 3)] * 3 + [document]


def test_arguments(tmp_path):
    for wrong in ({"domains": "bad.org"}, {"hard": ["Porn"]}, {"soft": ["a-b"]}, {"strict": [""]}, {"most_soft": -1}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            UrlFilter(**wrong)
    assert hash(FILTER) == hash(UrlFilter(FILTER.domains, FILTER.urls, FILTER.strict, FILTER.hard, FILTER.soft))
    (tmp_path / "list").write_bytes(b"# words\nbad.org\r\n\n  x.co.uk \nbad.org\n")
    assert word_list(tmp_path / "list") == {"bad.org", "x.co.uk"}
    (tmp_path / "list").write_bytes(b"a\xff")
    with pytest.raises(ValueError, match="not UTF-8"):
        word_list(tmp_path / "list")


def test_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "publicsuffixlist", None)
    with pytest.raises(ModuleNotFoundError, match=r"publicsuffixlist: pip install 'purelm\[curate\]'"):
        module._suffixes.__wrapped__()
