"""Which IP addresses are public: those that a host on the internet may have. No other one is reached by name.

Python's `is_global` does not decide it: its tables differ from release to release (3.10 to 3.13), and all of them take
most of the unassigned IPv6 space, and addresses that carry a private IPv4 address, for global. The tables here are of
IANA: the IPv4 and IPv6 Special-Purpose Address Registries, and the IPv6 Global Unicast Address Space (2000::/3). They
are stricter in one way: blocks for tunnels, relays and protocols are left out as a whole, since no storage is there.
"""

from __future__ import annotations

import ipaddress
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network

_NOT_PUBLIC_IPV4 = [
    IPv4Network(network)
    for network in (
        "0.0.0.0/8",  # this network
        "10.0.0.0/8",  # private
        "100.64.0.0/10",  # between a carrier and its customers; some clouds' own services
        "127.0.0.0/8",  # loopback
        "169.254.0.0/16",  # link-local; the clouds' metadata
        "172.16.0.0/12",  # private
        "192.0.0.0/24",  # protocol assignments
        "192.0.2.0/24",  # documentation
        "192.88.99.0/24",  # relays of 6to4
        "192.168.0.0/16",  # private
        "198.18.0.0/15",  # benchmarks
        "198.51.100.0/24",  # documentation
        "203.0.113.0/24",  # documentation
        "224.0.0.0/4",  # multicast
        "240.0.0.0/4",  # reserved; broadcast
    )
]
_GLOBAL_UNICAST = IPv6Network("2000::/3")
_NOT_PUBLIC_IPV6 = [
    IPv6Network(network)
    for network in (
        "2001::/23",  # protocol assignments: Teredo, benchmarks, ORCHID …
        "2001:db8::/32",  # documentation
        "2002::/16",  # 6to4: any IPv4 address, private ones too
        "3fff::/20",  # documentation
    )
]
# An address of these ends with an IPv4 address, which is what is reached: mapped (RFC 4291), NAT64 (RFC 6052).
_IPV4_INSIDE = [IPv6Network("::ffff:0:0/96"), IPv6Network("64:ff9b::/96")]
_ISATAP = (0x0000_5EFE, 0x0200_5EFE)  # the third quarter of an address that ends with an IPv4 address (RFC 5214, 6.1)


def is_public(address: str) -> bool:
    """Whether an address is global unicast, and so is the IPv4 address that an IPv6 one may carry.

    Raises ValueError if the text is no address.
    """
    ip = _parse(address)
    if isinstance(ip, IPv4Address):
        return _is_public_ipv4(ip)
    ipv4 = IPv4Address(int(ip) & 0xFFFF_FFFF)
    if _is_in(ip, _IPV4_INSIDE):
        return _is_public_ipv4(ipv4)
    if ip not in _GLOBAL_UNICAST or _is_in(ip, _NOT_PUBLIC_IPV6):
        return False
    return (int(ip) >> 32) & 0xFFFF_FFFF not in _ISATAP or _is_public_ipv4(ipv4)


def is_loopback(address: str) -> bool:
    """Whether an address is this machine's own: 127.0.0.0/8 or ::1. Raises ValueError if the text is no address."""
    ip = _parse(address)
    return ip.is_loopback if isinstance(ip, IPv4Address) else int(ip) == 1


def is_same(address: str, other: str) -> bool:
    """Whether two texts are the same address. Raises ValueError if one is none."""
    return _parse(address) == _parse(other)


def _parse(address: str) -> IPv4Address | IPv6Address:
    return ipaddress.ip_address(address.partition("%")[0])  # without the zone of a link-local address


def _is_public_ipv4(ip: IPv4Address) -> bool:
    return not _is_in(ip, _NOT_PUBLIC_IPV4)


def _is_in(ip: IPv4Address | IPv6Address, networks: list[IPv4Network] | list[IPv6Network]) -> bool:
    return any(ip in network for network in networks)
