# A host-aware SCSI disk, whose zones the kernel does not show: the suites straight and through a door, each report compared
# with that of sg_rep_zones; as a plain disk; what is refused.
scsi_debug zbc=aware zone_nr_conv=2
expect "what the kernel makes of it" none "$(cat /sys/block/${scsi#/dev/}/queue/zoned)"

echo "== the rules of host-aware disks"
ZBDKIT_TEST_SCSI=$scsi run /share/test-scsi --include-ignored --test-threads=1

echo "== the suites"
run zbdkit-drive conform "$scsi"
run zbdkit-drive conform "$scsi" --door /usr/local/bin/zbdkit

echo "== as the disk that the kernel sees"
run zbdkit io -n --image-opts "driver=file,filename=$scsi" -c 'write -P 7 12M 64k' -c 'read -P 7 12M 64k'
run zbdkit io "$scsi" -c 'zrp 12M 1' -c 'read -P 7 12M 64k'
told "requires cache.direct=on" zbdkit io --image-opts "driver=host_device,filename=$scsi" -c 'zrp 0 1'

echo "== a file system that knows nothing of zones"
run mkfs.ext4 -q "$scsi"
run mount "$scsi" /mnt
told "umount /mnt" zbdkit io "$scsi" -c 'zrp 0 1'
run umount /mnt
