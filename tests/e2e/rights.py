"""Rights of the API server: what roles grant, what a request needs."""

from __future__ import annotations

from collections.abc import Iterable

from real_cluster import Object

Right = tuple[str, str, str]
"""(group, resource or resource/subresource, verb)."""


def granted_by(roles: Iterable[Object]) -> set[Right]:
    """What roles allow."""
    return {
        (group, resource, verb)
        for role in roles
        for rule in role["rules"]
        for group in rule["apiGroups"]
        for resource in rule["resources"]
        for verb in rule["verbs"]
    }


def right(event: Object) -> Right:
    """What a request of the audit log needs."""
    about = event["objectRef"]
    parts = (about["resource"], about.get("subresource"))
    return about.get("apiGroup", ""), "/".join(filter(None, parts)), event["verb"]
