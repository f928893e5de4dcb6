-- FENCE: shut out every writer of an older epoch.
-- KEYS  meta
-- ARGV  epoch
-- Returns {word, ""}.
if tonumber(ARGV[1]) < tonumber(redis.call('HGET', KEYS[1], 'epoch') or '0') then
  return {'STALE', ''}
end
redis.call('HSET', KEYS[1], 'epoch', ARGV[1])
return {'OK', ''}
