# The daemon was killed and started again: every block that was acknowledged is there, and the write
# pointers cover exactly what was written.
run blkzone report "$DEV"
cp /share/pattern /tmp/pattern
blocks=$(wc -l </share/acknowledged)
per_zone=$((ZONE_MB * 16))
[ "$blocks" -gt 0 ] || fail "nothing was acknowledged"
echo "acknowledged: $blocks blocks of 64 KiB"
block() { dd if=/tmp/pattern bs=64k count=1 skip=$(($1 * 37 % 64)) status=none; }

written=0 # sectors below the write pointers of the lower half
for ((z = 0; z < SIZE_MB / ZONE_MB / 2; z++)); do
	read -r wptr condition <<<"$(zone $z)"
	[ "$condition" = fu ] && wptr=$((ZONE_MB * 2048))
	case $condition in
	oi | oe) fail "zone $z is open after a restart" ;;
	esac
	written=$((written + wptr))
	if [ $(((z + 1) * per_zone)) -le "$blocks" ]; then
		expect "zone $z is covered whole" $((ZONE_MB * 2048)) "$wptr"
	fi
done
acknowledged=$((blocks * 128))
[ $written -ge $acknowledged ] || fail "the pointers cover $written sectors, $acknowledged were acknowledged"
[ $written -le $((acknowledged + 128)) ] || fail "the pointers cover $written sectors, at most $((acknowledged + 128)) were written"
echo "ok: the pointers cover $written sectors; $acknowledged were acknowledged, one block was perhaps on its way"

for ((i = 0; i <= blocks; i++)); do block $i; done | head -c $((written * 512)) >/tmp/expected
dd if="$DEV" bs=64k count=$((written * 512)) iflag=direct,count_bytes status=none >/tmp/found || fail "cannot read"
run cmp /tmp/expected /tmp/found

echo "-- fio's half: every block below a write pointer carries the checksum that it was written with"
checked=0
for ((z = SIZE_MB / ZONE_MB / 2; z < SIZE_MB / ZONE_MB; z++)); do
	read -r wptr condition <<<"$(zone $z)"
	[ "$condition" = fu ] && wptr=$((ZONE_MB * 2048))
	[ "$wptr" = 0 ] && continue
	[ $((wptr % 8)) = 0 ] || fail "zone $z: the pointer $wptr is inside a block"
	fio --name=check --filename="$DEV" --direct=1 --rw=read --bs=4k --offset=$((z * ZONE_MB))M --size=$((wptr * 512)) \
		--zonemode=zbd --verify=crc32c --verify_interval=4k --verify_fatal=1 --verify_header_seed=0 --verify_write_sequence=0 --eta=never --minimal >/tmp/out 2>&1 ||
		{ cat /tmp/out; fail "zone $z"; }
	grep -iE 'verify:|bad' /tmp/out && fail "zone $z"
	checked=$((checked + wptr * 512))
done
[ $checked -gt 0 ] || fail "fio had written nothing"
echo "ok: $checked bytes verified"

echo "-- and the drive still works"
run blkzone reset "$DEV"
run put /tmp/pattern 0 0
run cmp /tmp/pattern <(get 0 0 4M)
