"""Every key in Redis and every script that runs there. The layout's version is SCHEMA_VERSION.

All keys share one hash tag. Changes of the index are transactions (`commit`); only figures are added up by scripts.
"""

from __future__ import annotations

SCHEMA_VERSION = 1

META = b"{manifold}:meta"  # hash: schema, index_id, generation, changed_at, settled, audit_count, audit_head
CHANGED = b"{manifold}:changed"  # sorted set: task by the generation of its last change
AUDIT = b"{manifold}:audit"  # list of entries as JSON, entry n at position n-1
RELEASES = b"{manifold}:releases"  # hash: id → JSON
KEYS = b"{manifold}:keys"  # hash: key id → JSON
FAILURES = b"{manifold}:failures"  # hash: see `failure_field` → JSON {reason, at}
HINTS = b"{manifold}:hints"  # channel: the generation after each change
KEPT = b"{manifold}:kept"  # list: keys of answers that wait for an outcome, oldest first


def task_key(task: str) -> bytes:
    """A hash: `task` → JSON of traffic, previous champions and last change; `v:<n>` → JSON of a version."""
    return b"{manifold}:task:" + to_bytes(task)


def task_audit_key(task: str) -> bytes:
    """A list: the sequence numbers of the audit entries that name this task."""
    return b"{manifold}:audit:task:" + to_bytes(task)


def failure_field(server: str, task: str, version: int) -> bytes:
    return to_bytes(f"{task}@{version} {server}")  # neither tasks nor versions have spaces


def comparison_key(task: str, champion: str, other: str) -> bytes:
    """A hash: sums over what two versions, by their digests, answered to the same texts, of all time."""
    return to_bytes(f"{{manifold}}:comparison:{task}:{champion}:{other}")


def experiment_key(comparison: bytes, salt: str) -> bytes:
    """The same of one experiment: a gate must not see figures of an earlier canary."""
    return comparison + to_bytes(f":{salt}")


def comparisons_key(task: str, champion: str) -> bytes:
    """A set: the digests of versions that have figures with this champion."""
    return to_bytes(f"{{manifold}}:comparisons:{task}:{champion}")


def flushed_key(source: str) -> bytes:
    """The number of the last batch of figures from one server."""
    return to_bytes(f"{{manifold}}:flushed:{source}")


def answers_key(request_id: str, task: str, index: int) -> bytes:
    """What versions said of one input, as JSON, until it expires; the truth once that was told."""
    return to_bytes(f"{{manifold}}:answers:{index}:{task}:{request_id}")


def to_bytes(text: str) -> bytes:
    """Names come from outside, and not every string that JSON can carry is UTF-8."""
    return text.encode("utf-8", "surrogatepass")


def from_bytes(raw: bytes | str) -> str:
    return raw if isinstance(raw, str) else raw.decode("utf-8", "replace")


# -- scripts that add up figures ---------------------------------------------------------------------------------------

# `entries` is JSON: for each pair the positions of its hashes and of its champion's list in KEYS, and what to add.
_ADD = """
local function add(entries, ttl_s)
  for _, entry in ipairs(cjson.decode(entries)) do
    for _, position in ipairs(entry.hashes) do
      local key = KEYS[position]
      for name, amount in pairs(entry.sums) do redis.call('HINCRBYFLOAT', key, name, amount) end
      for name, value in pairs(entry.largest) do
        local known = redis.call('HGET', key, name)
        if not known or tonumber(value) > tonumber(known) then redis.call('HSET', key, name, value) end
      end
      redis.call('EXPIRE', key, ttl_s)
    end
    redis.call('SADD', KEYS[entry.list], entry.other)
    redis.call('EXPIRE', KEYS[entry.list], ttl_s)
  end
end
"""
# KEYS[1]: the number of the last batch from this source. A batch sent again counts once.
ADD_BATCH = (
    _ADD
    + """
local number, entries, ttl_s, source_ttl_s = tonumber(ARGV[1]), ARGV[2], ARGV[3], ARGV[4]
if number <= tonumber(redis.call('GET', KEYS[1]) or '0') then return 0 end
add(entries, ttl_s)
redis.call('SET', KEYS[1], number, 'EX', source_ttl_s)
return 1
"""
)
# KEYS[1]: the answers to a text. They change from what was said to the truth in the step that counts it.
ADD_OUTCOME = (
    _ADD
    + """
local said, truth, entries, ttl_s = ARGV[1], ARGV[2], ARGV[3], ARGV[4]
if redis.call('GET', KEYS[1]) ~= said then return 0 end
add(entries, ttl_s)
redis.call('SET', KEYS[1], truth, 'KEEPTTL')
return 1
"""
)
# KEYS[1]: the list of kept answers. A text that is there already keeps its first answers; the oldest make room.
KEEP = """
local ttl_s, most = ARGV[1], tonumber(ARGV[2])
for position = 2, #KEYS do
  if redis.call('SET', KEYS[position], ARGV[position + 1], 'NX', 'EX', ttl_s) then
    redis.call('RPUSH', KEYS[1], KEYS[position])
  end
end
for _ = 1, redis.call('LLEN', KEYS[1]) - most do redis.call('UNLINK', redis.call('LPOP', KEYS[1])) end
redis.call('EXPIRE', KEYS[1], ttl_s)
"""
