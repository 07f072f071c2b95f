"""What the dashboards show."""

from .engines import ENGINES
from .kv_cache import KV_CACHE
from .overview import OVERVIEW
from .tenants import TENANTS

DASHBOARDS = (OVERVIEW, TENANTS, KV_CACHE, ENGINES)
