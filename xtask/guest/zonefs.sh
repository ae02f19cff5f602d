# zonefs: a file for each zone, appended to.
run mkzonefs -f "$DEV"
run modprobe zonefs
run mount -t zonefs "$DEV" /mnt
files=$((SIZE_MB / ZONE_MB - 1)) # the first zone holds the super block
expect "files" "$files" "$(ls /mnt/seq | wc -l)"
head -c 192k /dev/urandom >/tmp/data
run dd if=/tmp/data of=/mnt/seq/0 bs=64k oflag=append,direct conv=notrunc status=none
expect "size of seq/0" 196608 "$(stat -c %s /mnt/seq/0)"
run dd if=/tmp/data of=/mnt/seq/0 bs=4k oflag=append,direct conv=notrunc status=none
expect "size of seq/0" 393216 "$(stat -c %s /mnt/seq/0)"
refuse dd if=/tmp/data of=/mnt/seq/0 bs=64k seek=1 oflag=direct conv=notrunc
run dd if=/tmp/data of=/mnt/seq/3 bs=192k oflag=append,direct conv=notrunc status=none
expect "zone 4" "384 cl" "$(zone 4 | sed 's/oi$/cl/')"
run umount /mnt
run mount -t zonefs "$DEV" /mnt
expect "size of seq/0 after a remount" 393216 "$(stat -c %s /mnt/seq/0)"
run cmp /mnt/seq/0 <(cat /tmp/data /tmp/data)
run cmp /mnt/seq/3 /tmp/data
run truncate -s 0 /mnt/seq/0
expect "zone 1 after truncation" "0 em" "$(zone 1)"
run truncate -s "$(stat -c '%b' /mnt/seq/3 | awk '{ print $1 * 512 }')" /mnt/seq/3
case "$(zone 4)" in *" fu") echo "ok: zone 4 is full" ;; *) fail "zone 4 is $(zone 4)" ;; esac
run umount /mnt
run mount -t zonefs -o explicit-open "$DEV" /mnt
run dd if=/tmp/data of=/mnt/seq/1 bs=64k oflag=append,direct conv=notrunc status=none
run umount /mnt
expect "zone 2 after an explicit open and close" "384 cl" "$(zone 2)"
