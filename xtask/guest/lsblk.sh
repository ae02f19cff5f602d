# The drive is shown as what it was made as, and its report follows each operation.
run lsblk -z "$DEV"
run blkzone report "$DEV"
shown() { lsblk -dnr -z -o "$1" "$DEV"; }
expect ZONED host-managed "$(shown ZONED)"
expect ZONE-SZ "${ZONE_MB}M" "$(shown ZONE-SZ)"
expect ZONE-NR $((SIZE_MB / ZONE_MB)) "$(shown ZONE-NR)"
expect ZONE-AMAX "$MAX_ACTIVE" "$(shown ZONE-AMAX)"
expect ZONE-OMAX "$MAX_OPEN" "$(shown ZONE-OMAX)"
expect "empty zones" $((SIZE_MB / ZONE_MB)) "$(blkzone report "$DEV" | grep -c '(em)')"

full=$((ZONE_MB * 2048))
sector() { echo $(($1 * ZONE_MB * 2048)); }
head -c 3M /dev/urandom >/tmp/3M
head -c 4k /dev/urandom >/tmp/4k

echo "== writes move the write pointer"
run put /tmp/3M 0 0
expect "zone 0" "6144 oi" "$(zone 0)"
run put /tmp/4k 1 0
expect "zone 1" "8 oi" "$(zone 1)"
run cmp /tmp/3M <(get 0 0 3M)
run cmp /tmp/4k <(get 1 0 4k)

echo "== a write elsewhere than at the write pointer fails and moves nothing"
refuse put /tmp/4k 1 8192
refuse put /tmp/4k 1 0
expect "zone 1" "8 oi" "$(zone 1)"
run cmp /tmp/4k <(get 1 0 4k)

echo "== finish, and no write after it"
run blkzone finish -o "$(sector 1)" -c 1 "$DEV"
case "$(zone 1)" in *" fu") echo "ok: zone 1 is full" ;; *) fail "zone 1 is $(zone 1)" ;; esac
refuse put /tmp/4k 1 4096
run cmp /tmp/4k <(get 1 0 4k)
unwritten 1 4096 4k

echo "== open and close"
run blkzone open -o "$(sector 2)" -c 1 "$DEV"
expect "zone 2" "0 oe" "$(zone 2)"
run put /tmp/4k 2 0
expect "zone 2" "8 oe" "$(zone 2)"
run blkzone close -o "$(sector 2)" -c 1 "$DEV"
expect "zone 2" "8 cl" "$(zone 2)"
run put /tmp/4k 2 4096
expect "zone 2" "16 oi" "$(zone 2)"

echo "== reset of one zone, and of all"
run blkzone reset -o "$(sector 0)" -c 1 "$DEV"
expect "zone 0" "0 em" "$(zone 0)"
unwritten 0 0 64k
expect "zone 2" "16 oi" "$(zone 2)"
run blkzone reset "$DEV"
expect "empty zones" $((SIZE_MB / ZONE_MB)) "$(blkzone report "$DEV" | grep -c '(em)')"

echo "== a zone written to its end is full"
head -c "${ZONE_MB}M" /dev/urandom >/tmp/zone
run put /tmp/zone 3 0
case "$(zone 3)" in *" fu") echo "ok: zone 3 is full" ;; *) fail "zone 3 is $(zone 3)" ;; esac
run cmp /tmp/zone <(get 3 0 "${ZONE_MB}M")
run blkzone reset "$DEV"

echo "== the limit of open zones"
run blkzone open -o 0 -c "$MAX_OPEN" "$DEV"
refuse blkzone open -o "$(sector "$MAX_OPEN")" -c 1 "$DEV"
refuse put /tmp/4k "$MAX_OPEN" 0
run blkzone close -o 0 -c 1 "$DEV"
run blkzone open -o "$(sector "$MAX_OPEN")" -c 1 "$DEV"
run blkzone reset "$DEV"

echo "== the limit of active zones"
for ((i = 0; i < MAX_ACTIVE; i++)); do
	put /tmp/4k $i 0 || fail "zone $i"
done
refuse put /tmp/4k "$MAX_ACTIVE" 0
# An open zone: the kernel's null_blk refuses to finish a closed one while every open zone is in use.
run blkzone finish -o "$(sector $((MAX_ACTIVE - 1)))" -c 1 "$DEV"
# After a failed write Linux takes no other in that zone until it has seen a report.
expect "zone $MAX_ACTIVE" "0 em" "$(zone "$MAX_ACTIVE")"
run put /tmp/4k "$MAX_ACTIVE" 0
expect "open zones" "$MAX_OPEN" "$(blkzone report "$DEV" | grep -c '(oi)')"
expect "closed zones" $((MAX_ACTIVE - MAX_OPEN)) "$(blkzone report "$DEV" | grep -c '(cl)')"
run blkzone reset "$DEV"
