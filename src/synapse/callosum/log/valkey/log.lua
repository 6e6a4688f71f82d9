-- What ValkeyLog does on the server, each operation in one step. KEYS[1] is the prefix of all keys; ARGV[1] names the
-- operation, and the rest are its arguments.
--
-- Every message has a number, counted over both tracts; it is the entry <number>-0 of the stream of its tract:
--   t topic, k idempotency key, m the message as JSON. Without k it is a copy that `replay` gave back to one group.
-- A group is a consumer group of both streams. Its pending entries are what was delivered and not handled yet, and its
-- sorted sets `due:` say from when (milliseconds since 1970) each of them may be delivered again: XAUTOCLAIM knows one
-- idle time for all, and walks through all of them. The hashes `failed:` count the attempts that failed of each.

local prefix = KEYS[1]
local META, TAKEN, GROUPS = prefix .. 'meta', prefix .. 'keys', prefix .. 'groups'
local DEAD, DEAD_COUNTS, BELL = prefix .. 'dead', prefix .. 'dead-counts', prefix .. 'bell'
local STREAMS = { ['0'] = prefix .. 'external', ['1'] = prefix .. 'internal' }
-- In one step: entries looked at, bytes given, fewest entries let go of, arguments of a command, entries of one.
-- After so many milliseconds without a claim a group keeps nothing from being let go of; dead letters go then, too.
local UNREAD, OLDEST_DEAD = 7 * 24 * 3600000, 30 * 24 * 3600000
local MOST_SCANNED, MOST_BYTES, LEAST_TRIMMED, MOST_ARGUMENTS, PAGE = 2000, 8388608, 64, 1000, 128

local function text(number) return string.format('%.0f', number) end
local function entry_id(number) return text(number) .. '-0' end
local function number_of(id) return tonumber(string.match(id, '^%d+')) end
local function member_of(number) return string.format('%016.0f', number) end
local function due_key(uid, tract) return prefix .. 'due:' .. uid .. ':' .. tract end
local function failed_key(uid, tract) return prefix .. 'failed:' .. uid .. ':' .. tract end
local function group_key(uid) return prefix .. 'group:' .. uid end
local function meta(field) return tonumber(redis.call('HGET', META, field) or 0) end

local function milliseconds()
  local time = redis.call('TIME')
  return time[1] * 1000 + math.floor(time[2] / 1000)
end

local function fields_of(entry)
  local found = {}
  for at = 1, #entry[2], 2 do found[entry[2][at]] = entry[2][at + 1] end
  return found
end

-- Call a command with any number of arguments; the sum of its answers.
local function in_parts(arguments, command, ...)
  local sum = 0
  for first = 1, #arguments, MOST_ARGUMENTS do
    local part = { command, ... }
    for at = first, math.min(first + MOST_ARGUMENTS - 1, #arguments) do part[#part + 1] = arguments[at] end
    sum = sum + redis.call(unpack(part))
  end
  return sum
end

-- As synapse.callosum.topics.matcher; what it says is kept for the rest of the step.
local function matcher(pattern)
  local wanted, known = {}, {}
  for word in string.gmatch(pattern, '[^.]+') do wanted[#wanted + 1] = word end
  local open = wanted[#wanted] == '**'
  local function matches(topic)
    local at = 0
    for word in string.gmatch(topic, '[^.]+') do
      at = at + 1
      local want = wanted[at]
      if want == '**' then return true end
      if want ~= '*' and want ~= word then return false end
    end
    return at == #wanted and not open
  end
  return function(topic)
    if known[topic] == nil then known[topic] = matches(topic) end
    return known[topic]
  end
end

-- Which entries a group with this pattern, or a reader, is to get. Copies are not for them: they are pending already.
local function wants(pattern)
  local matches = matcher(pattern)
  return function(fields) return fields.k and fields.m and fields.t and matches(fields.t) end
end

-- The number behind which a group has looked at nothing yet.
local function cursor(stream, name)
  for _, group in ipairs(redis.call('XINFO', 'GROUPS', stream)) do
    local found = {}
    for at = 1, #group, 2 do found[group[at]] = group[at + 1] end
    if found.name == name then return number_of(found['last-delivered-id']) end
  end
  return 0
end

-- Rows {number, attempt or tract, body}: first what each of them is and how long, then all bodies; one string is quick to read.
local function packed(rows) -- of each row: number, one more or two, body
  local heads, bodies = {}, {}
  for at, row in ipairs(rows) do
    heads[at] = text(row[1]) .. ' ' .. row[2] .. ' ' .. #row[3] .. ' ' .. (row[4] or 0)
    bodies[at] = row[3]
  end
  return table.concat(heads, ','), table.concat(bodies)
end

local function by_number(one, other) return one[1] < other[1] end

-- The numbers and fields of the entries behind a number, one after the other; `count` are fetched first.
local function behind(stream, number, count)
  local entries, at = {}, 0
  return function()
    if at == #entries then
      entries, at = redis.call('XRANGE', stream, '(' .. entry_id(number), '+', 'COUNT', math.min(count, PAGE)), 0
      if #entries == 0 then return nil end
      number, count = number_of(entries[#entries][1]), PAGE
    end
    at = at + 1
    return number_of(entries[at][1]), fields_of(entries[at])
  end
end

-- The first number of a tract that a group has not handled, or nil. Moves its cursor over what it does not want.
local function first_needed(uid, name, tract)
  local stream = STREAMS[tract]
  local pending = redis.call('XPENDING', stream, name)
  if pending[1] > 0 then return number_of(pending[2]) end
  local start = cursor(stream, name)
  local at, needed, wanted = start, nil, wants(redis.call('HGET', group_key(uid), 'pattern'))
  local scanned = 0
  for number, fields in behind(stream, start, 1) do
    scanned = scanned + 1
    if wanted(fields) or scanned > MOST_SCANNED then
      needed = number
      break
    end
    at = number
  end
  if at > start then redis.call('XGROUP', 'SETID', stream, name, entry_id(at)) end
  return needed
end

-- Let go of what every group that is read has handled, beyond the newest `keep` messages; not each time that some came
-- or went, and of a bounded number of them. Answers the names of groups that are waited for no longer, a line each.
local function trim(keep, changed)
  local since = redis.call('HINCRBY', META, 'since', changed)
  if since < LEAST_TRIMMED then return '' end
  redis.call('HSET', META, 'since', 0)
  local most = LEAST_TRIMMED + 2 * since
  local cut = meta('seq') - meta('copies') - keep
  if meta('trimmed') >= cut then return '' end
  local groups, cleared, unread, told = {}, cut, milliseconds() - UNREAD, {}
  local all = redis.call('HGETALL', GROUPS)
  for at = 1, #all, 2 do
    if tonumber(redis.call('HGET', group_key(all[at + 1]), 'read') or unread + 1) > unread then
      groups[#groups + 1] = all[at]
      groups[#groups + 1] = all[at + 1]
    elseif redis.call('HSETNX', group_key(all[at + 1]), 'unread', 1) == 1 then
      told[#told + 1] = all[at]
    end
  end
  for tract, stream in pairs(STREAMS) do
    local floor = cut
    for at = 1, #groups, 2 do
      local needed = first_needed(groups[at + 1], groups[at], tract)
      if needed then floor = math.min(floor, needed - 1) end
    end
    local gone = redis.call('XRANGE', stream, '-', entry_id(floor), 'COUNT', most)
    local keys, copies = {}, 0
    for _, entry in ipairs(gone) do
      local fields = fields_of(entry)
      if fields.k then keys[#keys + 1] = fields.k else copies = copies + 1 end
    end
    if #gone == most then floor = number_of(gone[#gone][1]) end
    if #gone > 0 then redis.call('XTRIM', stream, 'MINID', '=', entry_id(floor + 1)) end
    in_parts(keys, 'SREM', TAKEN)
    if copies > 0 then redis.call('HINCRBY', META, 'copies', -copies) end
    cleared = math.min(cleared, floor)
  end
  redis.call('HSET', META, 'trimmed', text(cleared))
  return table.concat(told, '\n')
end

-- Note that a group is read; a server that is full gives what there is all the same.
local function note_read(uid)
  redis.pcall('HSET', group_key(uid), 'read', text(milliseconds()))
  redis.call('HDEL', group_key(uid), 'unread')
end

-- Wake who waits in XREAD: something is due at another time than they know.
local function ring()
  redis.call('XADD', BELL, 'MAXLEN', '=', 1, entry_id(redis.call('HINCRBY', META, 'bell', 1)), 'x', '')
end

-- Whether a delivery still stands: not handled, and not delivered again since.
local function stands(uid, name, tract, number, attempt)
  if redis.call('HGET', GROUPS, name) ~= uid then return false end
  local id = entry_id(number)
  local pending = redis.call('XPENDING', STREAMS[tract], name, id, id, 1)
  return pending[1] ~= nil and pending[1][4] == tonumber(attempt)
end

local operations = {}

function operations.open(layout)
  redis.call('HSETNX', META, 'layout', layout)
  return redis.call('HGET', META, 'layout')
end

-- topic, tract, key, body of each message
function operations.append(keep, ...)
  local seq, taken, accepted = meta('seq'), {}, 0
  for at = 3, #ARGV, 4 do
    if redis.call('SADD', TAKEN, ARGV[at + 2]) == 1 then
      accepted = accepted + 1
      local id = entry_id(seq + accepted)
      redis.call('XADD', STREAMS[ARGV[at + 1]], id, 't', ARGV[at], 'k', ARGV[at + 2], 'm', ARGV[at + 3])
      taken[#taken + 1] = '1'
    else
      taken[#taken + 1] = '0'
    end
  end
  redis.call('HINCRBY', META, 'seq', accepted)
  redis.call('HINCRBY', META, 'accepted', accepted)
  redis.call('HINCRBY', META, 'duplicates', #taken - accepted)
  return table.concat(taken) .. trim(tonumber(keep), accepted)
end

-- Answers: the number of the newest message, and the bell's.
function operations.newest() return { text(meta('seq')), text(meta('bell')) } end

-- Answers: the number of the newest message, the one up to which this has read, the bell's, heads (tracts), bodies.
function operations.read(after, limit, pattern)
  after, limit = tonumber(after), tonumber(limit)
  local rows, wanted, reached = {}, wants(pattern), meta('seq')
  local seq = reached
  for tract, stream in pairs(STREAMS) do
    local entries = redis.call('XRANGE', stream, '(' .. entry_id(after), '+', 'COUNT', PAGE)
    if #entries == PAGE then reached = math.min(reached, number_of(entries[PAGE][1])) end
    for _, entry in ipairs(entries) do
      local fields = fields_of(entry)
      if wanted(fields) then rows[#rows + 1] = { number_of(entry[1]), tract, fields.m } end
    end
  end
  table.sort(rows, by_number)
  while rows[#rows] and rows[#rows][1] > reached do rows[#rows] = nil end
  while #rows > limit do
    rows[#rows] = nil
    reached = rows[#rows][1]
  end
  return { text(seq), text(reached), text(meta('bell')), packed(rows) }
end

function operations.join(name, pattern, lease, start)
  local uid = redis.call('HGET', GROUPS, name)
  if not uid then
    uid = text(redis.call('HINCRBY', META, 'groups', 1))
    local first = start == 'first' and 0 or meta('seq')
    for _, stream in pairs(STREAMS) do
      redis.call('XGROUP', 'CREATE', stream, name, entry_id(first), 'MKSTREAM')
    end
    redis.call('HSET', GROUPS, name, uid)
    redis.call('HSET', group_key(uid), 'handled', 0, 'redelivered', 0)
  end
  redis.call('HSET', group_key(uid), 'pattern', pattern, 'lease', lease)
  note_read(uid)
  for _, stream in pairs(STREAMS) do
    for _, consumer in ipairs(redis.call('XINFO', 'CONSUMERS', stream, name)) do
      local found = {}
      for at = 1, #consumer, 2 do found[consumer[at]] = consumer[at + 1] end
      if found.pending == 0 and found.idle > 3600000 then
        redis.call('XGROUP', 'DELCONSUMER', stream, name, found.name)
      end
    end
  end
end

function operations.leave(name)
  local uid = redis.call('HGET', GROUPS, name)
  if not uid then return end
  for tract, stream in pairs(STREAMS) do
    redis.call('XGROUP', 'DESTROY', stream, name)
    redis.call('DEL', due_key(uid, tract), failed_key(uid, tract))
  end
  redis.call('DEL', group_key(uid))
  redis.call('HDEL', GROUPS, name)
end

-- Answers nothing where there is no such group; else its uid, the number up to which it has looked, the bell's number,
-- in how many milliseconds something is due (-1: nothing is), whether there was more to look at, heads, bodies.
function operations.claim(name, consumer, limit, tract)
  local uid = redis.call('HGET', GROUPS, name)
  if not uid then return false end
  limit = tonumber(limit)
  local about = redis.call('HMGET', group_key(uid), 'pattern', 'lease', 'read')
  local stream, due, now = STREAMS[tract], due_key(uid, tract), milliseconds()
  local rows, leases, redelivered, bytes = {}, {}, 0, 0
  local again = text(now + tonumber(about[2]))
  for _, member in ipairs(redis.call('ZRANGEBYSCORE', due, '-inf', now, 'LIMIT', 0, limit)) do
    local id = entry_id(tonumber(member))
    local pending = redis.call('XPENDING', stream, name, id, id, 1)[1]
    local entry = pending and redis.call('XCLAIM', stream, name, consumer, 0, id)[1]
    if entry then
      local failed = redis.call('HGET', failed_key(uid, tract), text(number_of(id)))
      rows[#rows + 1] = { number_of(id), pending[4] + 1, fields_of(entry).m, failed or 0 }
      bytes = bytes + #rows[#rows][3]
      if pending[4] > 0 then redelivered = redelivered + 1 end
      leases[#leases + 1] = again
      leases[#leases + 1] = member
    else
      redis.call('ZREM', due, member)
    end
    if bytes >= MOST_BYTES then break end
  end
  table.sort(rows, by_number)
  -- A full server refuses a step whose first change needs memory: the first is XCLAIM or SETID here, XACK below.
  if redelivered > 0 then redis.call('HINCRBY', group_key(uid), 'redelivered', redelivered) end
  local start, scanned, drained, ids = cursor(stream, name), 0, false, {}
  local at, wanted = start, wants(about[1])
  if #rows < limit and bytes < MOST_BYTES then
    drained = true
    for number, fields in behind(stream, start, limit - #rows) do
      at, scanned = number, scanned + 1
      if wanted(fields) then
        rows[#rows + 1] = { at, 1, fields.m }
        ids[#ids + 1] = entry_id(at)
        leases[#leases + 1] = again
        leases[#leases + 1] = member_of(at)
        bytes = bytes + #fields.m
      end
      if #rows == limit or scanned == MOST_SCANNED or bytes >= MOST_BYTES then
        drained = false
        break
      end
    end
  end
  if at > start then redis.call('XGROUP', 'SETID', stream, name, entry_id(at)) end
  for first = 1, #ids, MOST_ARGUMENTS do
    local part = { 'XCLAIM', stream, name, consumer, 0 }
    for place = first, math.min(first + MOST_ARGUMENTS - 1, #ids) do part[#part + 1] = ids[place] end
    for _, option in ipairs({ 'RETRYCOUNT', 1, 'FORCE', 'JUSTID' }) do part[#part + 1] = option end
    redis.call(unpack(part))
  end
  in_parts(leases, 'ZADD', due)
  if tonumber(about[3] or 0) < now - 3600000 then note_read(uid) end
  local soonest = redis.call('ZRANGE', due, 0, 0, 'WITHSCORES')[2]
  local wait = soonest and math.max(0, tonumber(soonest) - now) or -1
  local seen = drained and meta('seq') or at
  return { uid, text(seen), text(meta('bell')), text(wait), drained and 0 or 1, packed(rows) }
end

-- the numbers
function operations.acknowledge(keep, uid, name, tract, ...)
  if redis.call('HGET', GROUPS, name) ~= uid then return end
  local ids, members, numbers = {}, {}, {}
  for at = 6, #ARGV do
    numbers[#numbers + 1] = ARGV[at]
    ids[#ids + 1] = ARGV[at] .. '-0'
    members[#members + 1] = member_of(tonumber(ARGV[at]))
  end
  local handled = in_parts(ids, 'XACK', STREAMS[tract], name)
  in_parts(members, 'ZREM', due_key(uid, tract))
  in_parts(numbers, 'HDEL', failed_key(uid, tract))
  redis.call('HINCRBY', group_key(uid), 'handled', handled)
  trim(tonumber(keep), handled)
end

function operations.retry(name, uid, tract, number, attempt, after)
  if not stands(uid, name, tract, number, attempt) then return end
  redis.call('HINCRBY', failed_key(uid, tract), number, 1)
  redis.call('ZADD', due_key(uid, tract), text(milliseconds() + tonumber(after)), member_of(tonumber(number)))
  ring()
end

-- tract, number, attempt of each that nobody has begun to handle
function operations.release(name, uid, ...)
  for at = 4, #ARGV, 3 do
    local tract, number, attempt = ARGV[at], ARGV[at + 1], ARGV[at + 2]
    if stands(uid, name, tract, number, attempt) then
      local id = entry_id(tonumber(number))
      redis.call('XCLAIM', STREAMS[tract], name, 'released', 0, id, 'RETRYCOUNT', attempt - 1, 'FORCE', 'JUSTID')
      redis.call('ZADD', due_key(uid, tract), text(milliseconds()), member_of(tonumber(number)))
    end
  end
  ring()
end

local function forget(id, group)
  redis.call('XDEL', DEAD, id)
  if redis.call('HINCRBY', DEAD_COUNTS, group, -1) <= 0 then redis.call('HDEL', DEAD_COUNTS, group) end
end

function operations.bury(name, uid, tract, number, attempt, reason, message)
  local most = tonumber(ARGV[9])
  if not stands(uid, name, tract, number, attempt) then return end
  local stream, id, now = STREAMS[tract], entry_id(number), milliseconds()
  local entry = redis.call('XRANGE', stream, id, id)[1]
  redis.call('XACK', stream, name, id)
  redis.call('ZREM', due_key(uid, tract), member_of(tonumber(number)))
  if not entry then return end -- it was let go of: nobody had read the group for long
  local fields = fields_of(entry)
  local failed = redis.call('HGET', failed_key(uid, tract), number) or 0
  redis.call('HDEL', failed_key(uid, tract), number)
  redis.call('XADD', DEAD, '*', 'group', name, 'reason', reason, 'error', message, 'attempts', failed + 1,
    'at', text(now), 'tract', tract, 't', fields.t, 'm', fields.m)
  redis.call('HINCRBY', DEAD_COUNTS, name, 1)
  for _, entry in ipairs(redis.call('XRANGE', DEAD, '-', '+', 'COUNT', PAGE)) do
    local letter = fields_of(entry)
    if redis.call('XLEN', DEAD) <= most and tonumber(letter.at) >= now - OLDEST_DEAD then break end
    forget(entry[1], letter.group)
    redis.call('HINCRBY', META, 'dead_dropped', 1)
  end
end

local function give_back(id, fields)
  local number, stream = redis.call('HINCRBY', META, 'seq', 1), STREAMS[fields.tract]
  local due = due_key(redis.call('HGET', GROUPS, fields.group), fields.tract)
  redis.call('HINCRBY', META, 'copies', 1)
  redis.call('XADD', stream, entry_id(number), 't', fields.t, 'm', fields.m)
  redis.call('XCLAIM', stream, fields.group, 'replay', 0, entry_id(number), 'RETRYCOUNT', 0, 'FORCE', 'JUSTID')
  redis.call('ZADD', due, text(milliseconds()), member_of(number))
  forget(id, fields.group)
end

-- id, group, reason, error, attempts, time, tract, body of each dead letter, newest first
function operations.dead(before, count)
  local found = {}
  for _, entry in ipairs(redis.call('XREVRANGE', DEAD, before, '-', 'COUNT', count)) do
    local fields = fields_of(entry)
    for _, value in ipairs({ entry[1], fields.group, fields.reason, fields.error, fields.attempts, fields.at,
      fields.tract, fields.m }) do found[#found + 1] = value end
  end
  return found
end

-- what to do, and the ids, oldest first. Answers how many, or the id of one that is missing or whose group is, and that
-- group; then nothing was done.
function operations.letters(what)
  local found = {}
  for at = 3, #ARGV do
    local entry = redis.call('XRANGE', DEAD, ARGV[at], ARGV[at])[1]
    if not entry then return { -1, ARGV[at] } end
    found[#found + 1] = fields_of(entry)
    if what == 'replay' and redis.call('HEXISTS', GROUPS, found[#found].group) == 0 then
      return { -1, ARGV[at], found[#found].group }
    end
  end
  for at, fields in ipairs(found) do
    if what == 'replay' then give_back(ARGV[at + 2], fields) else forget(ARGV[at + 2], fields.group) end
  end
  return { #found }
end

-- The next ones from one id to another. Answers how many, and from where to go on and up to where ('' at the end).
function operations.all_letters(what, from, last)
  local done = 0
  if last == '+' then
    local newest = redis.call('XREVRANGE', DEAD, '+', '-', 'COUNT', 1)[1]
    if not newest then return { 0, '', '' } end
    last = newest[1]
  end
  local entries = redis.call('XRANGE', DEAD, from, last, 'COUNT', PAGE)
  for _, entry in ipairs(entries) do
    local fields = fields_of(entry)
    local there = redis.call('HEXISTS', GROUPS, fields.group) == 1
    if what == 'drop' or there then
      done = done + 1
      if what == 'replay' then give_back(entry[1], fields) else forget(entry[1], fields.group) end
    end
  end
  return { done, #entries == PAGE and '(' .. entries[#entries][1] or '', last }
end

-- kept, accepted, duplicates, dead letters dropped; then of each group: uid, name, pattern, pending, handled,
-- redelivered, dead, when it was read
function operations.stats()
  local kept = -meta('copies')
  for _, stream in pairs(STREAMS) do kept = kept + redis.call('XLEN', stream) end
  local found = { kept, meta('accepted'), meta('duplicates'), meta('dead_dropped') }
  local groups = redis.call('HGETALL', GROUPS)
  for at = 1, #groups, 2 do
    local name, uid, pending = groups[at], groups[at + 1], 0
    for _, stream in pairs(STREAMS) do pending = pending + redis.call('XPENDING', stream, name)[1] end
    local about = redis.call('HMGET', group_key(uid), 'pattern', 'handled', 'redelivered', 'read')
    local dead = redis.call('HGET', DEAD_COUNTS, name) or '0'
    for _, value in ipairs({ uid, name, about[1], pending, about[2], about[3], dead, about[4] or '0' }) do found[#found + 1] = value end
  end
  return found
end

-- How many of the next entries a group wants that it has not looked at, and from where to go on ('' at the end).
function operations.waiting(uid, name, pattern, tract, after)
  if redis.call('HGET', GROUPS, name) ~= uid then return { 0, '' } end
  local stream, wanted, waiting, scanned = STREAMS[tract], wants(pattern), 0, 0
  for number, fields in behind(stream, tonumber(after) or cursor(stream, name), PAGE) do
    scanned = scanned + 1
    if wanted(fields) then waiting = waiting + 1 end
    if scanned == MOST_SCANNED then return { waiting, text(number) } end
  end
  return { waiting, '' }
end

return operations[ARGV[1]](unpack(ARGV, 2, math.min(#ARGV, 9)))
