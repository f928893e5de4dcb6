-- ADOPT: give the drafted keys of an imported ledger their names, all at once or not at all.
-- KEYS  log meta cfg refs, then their drafts in the same order
-- Returns {word, ""}. Checks, in order: no event is there, the draft is.
if #redis.call('XREVRANGE', KEYS[1], '+', '-', 'COUNT', 1) > 0 then return {'DUP', ''} end
if #redis.call('XREVRANGE', KEYS[5], '+', '-', 'COUNT', 1) == 0 then return {'UNKNOWN', ''} end

-- Writers that an operator has shut out of this run stay shut out.
local fence = tonumber(redis.call('HGET', KEYS[2], 'epoch') or '0')
for i = 1, 4 do
  redis.call('UNLINK', KEYS[i])
  if redis.call('PTTL', KEYS[i + 4]) ~= -2 then
    redis.call('RENAME', KEYS[i + 4], KEYS[i])
    redis.call('PERSIST', KEYS[i])
  end
end
if fence > tonumber(redis.call('HGET', KEYS[2], 'epoch') or '0') then
  redis.call('HSET', KEYS[2], 'epoch', string.format('%d', fence))
end
return {'OK', ''}
