"""Which addresses are public. The rows must hold on every Python: their own `is_global` differ."""

from __future__ import annotations

from ipaddress import IPv4Address, IPv6Address

import pytest
from hypothesis import given
from hypothesis import strategies as st

from a1111_worker.transfer.addresses import is_loopback, is_public


@pytest.mark.parametrize(
    ("address", "expected"),
    [
        ("93.184.216.34", True),
        ("1.1.1.1", True),
        ("223.255.255.255", True),
        ("0.0.0.0", False),
        ("10.1.2.3", False),
        ("100.63.255.255", True),
        ("100.64.0.1", False),
        ("100.100.100.200", False),  # a cloud's metadata
        ("100.128.0.0", True),
        ("127.0.0.1", False),
        ("169.254.169.254", False),  # most clouds' metadata
        ("172.15.255.255", True),
        ("172.16.0.1", False),
        ("172.32.0.0", True),
        ("192.0.0.9", False),  # an anycast protocol address: global to Python, but no storage
        ("192.0.0.192", False),  # a cloud's metadata
        ("192.0.2.1", False),
        ("192.88.99.1", False),
        ("192.168.1.1", False),
        ("198.18.0.1", False),
        ("198.51.100.1", False),
        ("203.0.113.1", False),
        ("224.0.0.1", False),
        ("240.0.0.1", False),
        ("255.255.255.255", False),
        # IPv6: 2000::/3 alone
        ("2606:4700::6810:84e5", True),
        ("2a00:1450:4001:81b::200e", True),
        ("2001:200::1", True),  # the first address behind the protocol assignments
        ("2001:4860:4860::8888", True),
        ("::", False),
        ("::1", False),
        ("100::1", False),  # discarded
        ("100:0:0:1::1", False),  # a dummy prefix
        ("200::1", False),  # unassigned
        ("4000::1", False),
        ("5f00::1", False),  # segment routing
        ("fc00::1", False),
        ("fd00::1", False),
        ("fe80::1%eth0", False),
        ("fec0::1", False),  # site-local
        ("ff02::1", False),
        ("2001::1", False),  # Teredo
        ("2001:2::1", False),  # benchmarks
        ("2001:1ff:ffff::1", False),
        ("2001:db8::1", False),
        ("3fff::1", False),  # documentation
        ("3fff:fff:ffff::1", False),
        ("3fff:1000::1", True),
        # IPv4 inside IPv6
        ("::10.0.0.1", False),  # compatible
        ("::93.184.216.34", False),
        ("::ffff:10.0.0.1", False),  # mapped
        ("::ffff:127.0.0.1", False),
        ("::ffff:93.184.216.34", True),
        ("::ffff:0:10.0.0.1", False),  # translated
        ("::ffff:0:93.184.216.34", False),
        ("64:ff9b::169.254.169.254", False),  # NAT64
        ("64:ff9b::93.184.216.34", True),
        ("64:ff9b:1::1", False),  # local NAT64
        ("64:ff9b:1::93.184.216.34", False),
        ("2002:7f00:1::", False),  # 6to4
        ("2002:5db8:d822::1", False),
        ("2606:4700::5efe:10.0.0.1", False),  # ISATAP
        ("2606:4700::200:5efe:192.168.0.1", False),
        ("2606:4700::200:5efe:93.184.216.34", True),
        ("fe80::5efe:93.184.216.34", False),
    ],
)
def test_which_addresses_are_public(address: str, expected: bool) -> None:
    assert is_public(address) is expected


@given(st.ip_addresses())
def test_no_address_is_public_that_python_does_not_call_global(address: IPv4Address | IPv6Address) -> None:
    assert not is_public(str(address)) or (address.is_global and not address.is_multicast)


@given(st.ip_addresses(v=4), st.sampled_from(["::ffff:{}", "64:ff9b::{}", "2606:4700::5efe:{}"]))
def test_an_address_that_carries_an_ipv4_address_is_judged_by_it(address: IPv4Address, form: str) -> None:
    assert is_public(form.format(address)) is is_public(str(address))


@given(st.ip_addresses(v=4), st.sampled_from(["::{}", "::ffff:0:{}", "64:ff9b:1::{}", "fe80::5efe:{}"]))
def test_no_other_form_of_an_ipv4_address_is_public(address: IPv4Address, form: str) -> None:
    assert not is_public(form.format(address))


@pytest.mark.parametrize(
    ("address", "expected"),
    [("127.0.0.1", True), ("127.9.9.9", True), ("::1", True), ("10.0.0.1", False), ("::ffff:127.0.0.1", False)],
)
def test_which_addresses_are_this_machines_own(address: str, expected: bool) -> None:
    assert is_loopback(address) is expected


@pytest.mark.parametrize("text", ["", "nowhere", "1.2.3", "010.0.0.1"])
def test_what_is_no_address_is_neither(text: str) -> None:
    with pytest.raises(ValueError, match="not appear to be"):
        is_public(text)
