# The first half of the demonstration: a new drive gets a file system and a file.
echo "-- The guest's kernel sees a zoned drive, with the figures it was made with:"
run lsblk -z "$DEV"
expect "kind of drive" host-managed "$(lsblk -dnr -z -o ZONED "$DEV")"
expect "number of zones" $((SIZE_MB / ZONE_MB)) "$(lsblk -dnr -z -o ZONE-NR "$DEV")"
expect "zone size" "${ZONE_MB}M" "$(lsblk -dnr -z -o ZONE-SZ "$DEV")"
expect "open zones, at most" "$MAX_OPEN" "$(lsblk -dnr -z -o ZONE-OMAX "$DEV")"
expect "active zones, at most" "$MAX_ACTIVE" "$(lsblk -dnr -z -o ZONE-AMAX "$DEV")"
echo
echo "-- All zones are empty, their write pointers at their starts:"
run blkzone report "$DEV"
expect "empty zones" $((SIZE_MB / ZONE_MB)) "$(blkzone report "$DEV" | grep -c '(em)')"
echo
echo "-- btrfs writes each zone from its start to its end, and never in place:"
modprobe btrfs
run mkfs.btrfs -f -O zoned -d single -m single "$DEV"
run mount -t btrfs "$DEV" /mnt
run btrfs subvolume create /mnt/home
echo "guest# echo '$HELLO' > /mnt/home/hello.txt"
echo "$HELLO" >/mnt/home/hello.txt || fail "cannot write"
run sync
run cat /mnt/home/hello.txt
run umount /mnt
echo
echo "-- The report shows which zones were written, and how far:"
run blkzone report "$DEV"
blkzone report "$DEV" | grep -qv '(em)' || fail "no zone was written"
echo "-- Power off."
