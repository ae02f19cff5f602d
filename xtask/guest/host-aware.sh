# A host-aware SCSI disk, whose zones the kernel does not show: the suites straight and through a door, each report compared
# with that of sg_rep_zones; as a plain disk; what is refused.
install -D -t /usr/local/bin /share/zbdkit /share/zbdkit-drive || fail "no programs"
modprobe sd_mod
modprobe scsi_debug zbc=aware dev_size_mb=64 zone_size_mb=4 zone_nr_conv=2 || fail "no scsi_debug"
udevadm settle
disk=/dev/$(lsblk -dno NAME,MODEL | sed -n 's/ *scsi_debug.*//p')
[ -b "$disk" ] || fail "scsi_debug has no disk"
expect "what the kernel makes of it" none "$(cat /sys/block/${disk#/dev/}/queue/zoned)"

echo "== the rules of host-aware disks"
ZBDKIT_TEST_SCSI=$disk run /share/test-scsi --include-ignored --test-threads=1

echo "== the suites"
run zbdkit-drive conform "$disk"
run zbdkit-drive conform "$disk" --door /usr/local/bin/zbdkit

echo "== as the disk that the kernel sees"
run zbdkit io -n --image-opts "driver=file,filename=$disk" -c 'write -P 7 12M 64k' -c 'read -P 7 12M 64k'
run zbdkit io "$disk" -c 'zrp 12M 1' -c 'read -P 7 12M 64k'
said=$(zbdkit io --image-opts "driver=host_device,filename=$disk" -c 'zrp 0 1' 2>&1) && fail "opened with the page cache"
case "$said" in *"requires cache.direct=on"*) echo "ok: requires cache.direct=on" ;; *) fail "$said" ;; esac

echo "== a file system that knows nothing of zones"
run mkfs.ext4 -q "$disk"
run mount "$disk" /mnt
said=$(zbdkit io "$disk" -c 'zrp 0 1' 2>&1) && fail "opened a mounted disk"
case "$said" in *"umount /mnt"*) echo "ok: umount /mnt" ;; *) fail "$said" ;; esac
run umount /mnt
