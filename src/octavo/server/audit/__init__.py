"""The audit log: one line for each request, which shows who asked what and when, and that no line was changed."""

from .log import AuditLog

__all__ = ["AuditLog"]
