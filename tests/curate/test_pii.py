"""Masking. Oracles: cases by hand; Python's ipaddress; idempotence and counts as laws."""

import ipaddress
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from purelm.curate.document import Document
from purelm.curate.pii import EMAIL, IP, PHONE, PII, mask, mask_emails, mask_ips, mask_phones, mask_pii

EMAILS = [
    "a@b.com", "first.last+tag@sub.example.co.uk", "o'neil@x.ie", "a..b@x.org", "A_B%c@X-Y.museum", "1@2.io",
    "x" * 64 + "@example.org",
]  # fmt: skip
NO_EMAILS = [
    "icon@2x.png",
    "@name",
    "foo@bar",
    "me@10.0.0.1",
    "me@x.org2",
    "me@exam_ple.com",
    "@@",
    "a @ b.com",
    "a@-b.com",
]
PHONES = [
    "2831823829", "(283)-182-3829", "(283) 182-3829", "283-182-3829", "283.182.3829", "283 182 3829", "1-800-555-0199",
    "+1 (212) 555-0123", "+1.212.555.0123", "+12125550123", "+44 20 7946 0958", "+442079460958", "0044 20 7946 0958",
    "020 7946 0958", "(020) 7946 0958", "07700 900123", "01 42 68 53 00", "01.42.68.53.00", "+33 1 42 68 53 00",
    "+86 138 0013 8000", "+49 (0) 30 123456", "+91-98765-43210", "0412 345 678",
]  # fmt: skip
NO_PHONES = [
    "1609459200", "2023-10-12", "3.14159265358", "ISBN 978-3-16-148410-0", "ISBN 3161484100", "ISBN-10: 3161484100",
    "9783161484100", "0-306-40615-2", "1,234,567,8901", "$2125550123", "v2.125.555.0123", "12:30:45", "10/12/2023 2031",
    "2023-01-01 2023-02-02", "2021 2022 2023 2024", "+3.14159265", "id=2125550123", "/2125550123", "2125550123456",
    "4111 1111 1111 1111", "100-200-3000", "234,567.8901", "01.02.2003", "1.2.3", "212-555-01234", "a2125550123",
    "2125550123x", "12345-6789", "2019-2020-2021", "555-0123", "335.5475910", "997 998 999 1000 1001", "doi:2125550123",
    "+1234567", "+1 2345 6789 0123 4567", "08 09 10 11 12 2003", "2125550123.5", "2125550123%",
]  # fmt: skip
IPS = ["192.0.2.146", "0.0.0.0", "255.255.255.255", "10.0.0.1"]
NO_IPS = [
    "version 1.2.3.4", "Version: 1.2.3.4", "v1.2.3.4", "v. 1.2.3.4", "256.1.1.1", "1.2.3", "1.2.3.4.5", "01.02.03.04",
    "Chrome/91.0.44.12", "Section 1.2.3.4", "\u00a7 1.2.3.4", "1.2.3.4-beta", "1.2.3.4rc1", "release 1.2.3.4",
    "1.2.3.4_5",
]  # fmt: skip
IPV6 = ["2001:db8::1", "::1", "1:2:3:4:5:6:7:8", "2001:db8::8a2e:370:7334", "::ffff:0:1", "1::"]
NO_IPV6 = [
    "12:30:45", "std::vector", "a::b", "aa:bb:cc:dd:ee:ff", "11:22:33:44:55:66", "x ::", "1:2:3:4:5:6:7:8:9", ":1",
]  # fmt: skip
AROUND = [
    "{}",
    "call {}.",
    "({}) or",
    "a, {}, b",
    '"{}"',
    "{}; x",
    "\xe9\n{}\n",
    "\u65e5\u672c {} ",
    "is: {}!",
    "<{}>",
    "{}?",
]


@pytest.mark.parametrize(
    ("found", "not_found", "mark", "f"),
    [
        (EMAILS, NO_EMAILS, EMAIL, mask_emails), (PHONES, NO_PHONES, PHONE, mask_phones), (IPS, NO_IPS, IP, mask_ips),
        (IPV6, NO_IPV6, IP, lambda text: mask_ips(text, v4=False, v6=True)),
    ],
    ids=["emails", "phones", "ipv4", "ipv6"],
)  # fmt: skip
def test_forms(found, not_found, mark, f):
    for around in AROUND:
        for text in found:
            assert f(around.format(text)) == (around.format(mark), 1), around.format(text)
        for text in not_found:
            assert f(around.format(text)) == (around.format(text), 0), around.format(text)


def test_several():
    text = "To a@x.com,b@y.com; at http://10.0.0.1:80/, 10.0.0.0/8 or tel:2125550123 and +442079460958, ::1."
    want = f"To {EMAIL},{EMAIL}; at http://{IP}:80/, {IP}/8 or tel:{PHONE} and {PHONE}, ::1."
    counts = {"emails": 2, "ips": 2, "phones": 2}
    assert mask_pii(text) == (want, counts) and mask_pii(text, PII(ipv6=True))[1] == counts | {"ips": 3}
    assert mask_pii(text, PII(emails=False, phones=False, ipv4=False)) == (text, {})
    assert mask_emails("a@b.com-x@c.com") == (f"{EMAIL}-{EMAIL}", 2)  # the second ends where the first does
    document = Document("1", text, meta={"a": 1})
    assert mask(document, PII()) == Document("1", want, meta={"a": 1, "pii": counts})
    assert mask(Document("2", "nothing"), PII()) == Document("2", "nothing")
    with pytest.raises(ValueError, match="emails=1"):
        PII(emails=1)


PIECES = st.sampled_from(
    [*EMAILS, *PHONES, *IPS, *IPV6, *NO_PHONES, *NO_IPS, *NO_EMAILS, " ", "-", ".", "@", "(", "+", ":"]
)
TEXTS = (
    st.lists(PIECES, max_size=8).map("".join) | st.text("ab1205 .-+()@:/|\u0663", max_size=60) | st.text(max_size=40)
)


@settings(max_examples=150)
@given(TEXTS)
def test_laws(text):
    """Idempotent; counts are the marks that came; what is left of the text is in order what it was."""
    everything = PII(ipv6=True)
    masked, counts = mask_pii(text, everything)
    assert mask_pii(masked, everything) == (masked, {})
    for name, mark in (("emails", EMAIL), ("phones", PHONE), ("ips", IP)):
        assert masked.count(mark) - text.count(mark) == counts.get(name, 0)
    parts = re.split("|".join(re.escape(mark) for mark in (EMAIL, PHONE, IP)), masked)
    assert re.fullmatch(".+".join(map(re.escape, parts)), text, re.DOTALL)
    for one in (mask_emails, mask_phones, mask_ips):
        assert one(one(text)[0])[1] == 0


@given(st.ip_addresses(v=4), st.ip_addresses(v=6))
def test_every_address(four, six):
    """Oracle: ipaddress's way of writing; an IPv6 of letters alone is not one here."""
    assert mask_ips(f"at {four}.") == (f"at {IP}.", 1)
    expected = any(c.isdigit() for c in str(six))
    assert mask_ips(f"at {six},", v6=True)[1] == expected
    assert mask_ips(f"at {six.exploded},", v6=True) == (f"at {IP},", 1) or not any(c.isdigit() for c in six.exploded)


@settings(max_examples=200)
@given(st.text("0123456789.", min_size=7, max_size=17))
def test_nothing_else_is_an_ipv4(text):
    """Oracle: ipaddress, which refuses leading zeros and numbers above 255."""
    try:
        ipaddress.IPv4Address(text)
        assert mask_ips(text) == (IP, 1)
    except ValueError:
        assert mask_ips(text)[0] != IP


@pytest.mark.parametrize(
    "piece",
    [
        "@", "a", "1", "1.", "+1", "(", "0 ", "212-", "a@", "a.@a.", ":", "1:", "00 ", "+1 2 ", "(0123) ", "a-", "x@a.",
        "1.1.1.1/", "+1 212 555 0123", "(212) 555-0123", "a@b.co", "::1/", "1.1.1.1/+1 212 555 0123",
    ],
)  # fmt: skip
def test_long_rows_end(piece):
    """150 kB for which a pattern that backtracks would take hours, and one that looks far minutes."""
    text = piece * (150_000 // len(piece))
    masked, counts = mask_pii(text, PII(ipv6=True))
    assert masked.count("|||") == 2 * sum(counts.values()) and (counts or masked == text)
