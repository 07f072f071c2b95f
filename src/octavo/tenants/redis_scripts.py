"""The decisions of RedisLimiter, one Lua script each: Redis runs a script as a whole, so decisions are exact.

Times are in microseconds. The argument `now` is the time; "" stands for the clock of Redis, which is the same for all
frontends. ENTER and RESERVE return {0 if allowed, else the limit's number; wait; remaining; reset}.
"""

from .limiter import Limit

LIMITS: tuple[Limit | None, ...] = (None, "requests", "concurrent", "tokens", "month")
FINAL = 5  # the number of "month" if the month's budget is used up

_NOW = """
local minute = 60000000
local now = tonumber(ARGV[1])
if not now then
    local time = redis.call('TIME')
    now = time[1] * 1000000 + time[2]
end
local function text(number) return string.format('%.0f', number) end
"""

# KEYS: requests, running. ARGV: now, id, requests_per_minute, concurrent_requests (0: no limit), lease.
ENTER = (
    _NOW
    + """
local id, limit, concurrent = ARGV[2], tonumber(ARGV[3]), tonumber(ARGV[4])
redis.call('ZREMRANGEBYSCORE', KEYS[1], '-inf', text(now - minute))
redis.call('ZREMRANGEBYSCORE', KEYS[2], '-inf', text(now))
if redis.call('ZSCORE', KEYS[2], id) then  -- asked again, since the reply was lost
    return {0, 0, limit > 0 and math.max(0, limit - redis.call('ZCARD', KEYS[1])) or -1, 0}
end
if concurrent > 0 and redis.call('ZCARD', KEYS[2]) >= concurrent then return {2, 1000000, -1, 0} end
local count = redis.call('ZCARD', KEYS[1])
local function reset()
    local last = redis.call('ZRANGE', KEYS[1], -1, -1, 'WITHSCORES')[2]
    return last and tonumber(last) + minute - now or 0
end
if limit > 0 and count >= limit then
    local first = redis.call('ZRANGE', KEYS[1], count - limit, count - limit, 'WITHSCORES')[2]
    return {1, tonumber(first) + minute - now, 0, reset()}
end
redis.call('ZADD', KEYS[2], text(now + ARGV[5]), id)
redis.call('PEXPIRE', KEYS[2], 120000)
if limit == 0 then return {0, 0, -1, 0} end
redis.call('ZADD', KEYS[1], text(now), id)
redis.call('PEXPIRE', KEYS[1], 120000)
return {0, 0, limit - count - 1, reset()}
"""
)

# Undo ENTER. KEYS: as for ENTER. ARGV: id.
WITHDRAW = """
for _, key in ipairs(KEYS) do redis.call('ZREM', key, ARGV[1]) end
"""

# Below, `events` has the id of each request of the last minute by its time, and `amounts` its tokens, and their sum.
# `open` has the ids of requests that run, by the end of their lease, and `held` what they have reserved, as
# "reserved:prompt:month". `months` has the tokens used in each month, and those reserved, as "month:reserved".
_TOKENS = (
    _NOW
    + """
local events, amounts, open, held, months = KEYS[1], KEYS[2], KEYS[3], KEYS[4], KEYS[5]
local function forget()
    for _, id in ipairs(redis.call('ZRANGEBYSCORE', events, '-inf', text(now - minute))) do
        redis.call('HINCRBY', amounts, 'sum', -(redis.call('HGET', amounts, id) or 0))
        redis.call('HDEL', amounts, id)
        redis.call('ZREM', events, id)
    end
end
local function settle(id, used)
    local value = redis.call('HGET', held, id)
    if not value then return end
    local reserved, prompt, month = string.match(value, '^(%d+):(%d+):(.+)$')
    redis.call('HDEL', held, id)
    redis.call('ZREM', open, id)
    redis.call('HINCRBY', months, month .. ':reserved', -reserved)
    redis.call('HINCRBY', months, month, used or prompt)
    local before = used and redis.call('HGET', amounts, id)
    if before then
        redis.call('HINCRBY', amounts, 'sum', used - before)
        redis.call('HSET', amounts, id, used)
    end
end
"""
)

# KEYS: events, amounts, open, held, months.
# ARGV: now, id, reserved, prompt, tokens_per_minute, monthly_tokens (0: no limit), month, lease.
RESERVE = (
    _TOKENS
    + """
local id, amount, limit, budget, month = ARGV[2], tonumber(ARGV[3]), tonumber(ARGV[5]), tonumber(ARGV[6]), ARGV[7]
forget()
if redis.call('HEXISTS', held, id) == 1 then  -- asked again, since the reply was lost
    return {0, 0, limit > 0 and math.max(0, limit - (redis.call('HGET', amounts, 'sum') or 0)) or -1, 0}
end
for _, lost in ipairs(redis.call('ZRANGEBYSCORE', open, '-inf', text(now))) do settle(lost) end
local used = tonumber(redis.call('HGET', months, month) or 0)
local reserved = tonumber(redis.call('HGET', months, month .. ':reserved') or 0)
if budget > 0 and used + amount > budget then return {5, 0, -1, 0} end
if budget > 0 and used + reserved + amount > budget then return {4, 1000000, -1, 0} end
local sum = tonumber(redis.call('HGET', amounts, 'sum') or 0)
local function reset()
    local last = redis.call('ZRANGE', events, -1, -1, 'WITHSCORES')[2]
    return last and tonumber(last) + minute - now or 0
end
if limit > 0 and amount > limit then return {3, -1, math.max(0, limit - sum), reset()} end
if limit > 0 and sum + amount > limit then
    local excess, first = sum + amount - limit, 0
    while true do
        local some = redis.call('ZRANGE', events, first, first + 99, 'WITHSCORES')
        for i = 1, #some, 2 do
            excess = excess - tonumber(redis.call('HGET', amounts, some[i]))
            if excess <= 0 then return {3, tonumber(some[i + 1]) + minute - now, math.max(0, limit - sum), reset()} end
        end
        first = first + 100
    end
end
redis.call('ZADD', open, text(now + ARGV[8]), id)
redis.call('HSET', held, id, ARGV[3] .. ':' .. ARGV[4] .. ':' .. month)
redis.call('HINCRBY', months, month .. ':reserved', amount)
redis.call('EXPIRE', months, 6000000)
if limit == 0 then return {0, 0, -1, 0} end
redis.call('ZADD', events, text(now), id)
redis.call('HSET', amounts, id, amount)
redis.call('HINCRBY', amounts, 'sum', amount)
redis.call('PEXPIRE', events, 120000)
redis.call('PEXPIRE', amounts, 120000)
return {0, 0, limit - sum - amount, reset()}
"""
)

# KEYS: as for RESERVE. ARGV: now, id, used.
SETTLE = (
    _TOKENS
    + """
forget()
settle(ARGV[2], tonumber(ARGV[3]))
"""
)

# KEYS: running, open. ARGV: now, lease, ids.
RENEW = (
    _NOW
    + """
for i = 3, #ARGV do
    for _, key in ipairs(KEYS) do redis.call('ZADD', key, 'XX', text(now + ARGV[2]), ARGV[i]) end
end
redis.call('PEXPIRE', KEYS[1], 120000)
"""
)
