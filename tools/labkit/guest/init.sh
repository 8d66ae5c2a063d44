#!/bin/busybox sh
# First program in the VM: loads the modules that reach the disks, puts the root together, hands over.
B=/bin/busybox
$B mount -t proc proc /proc
$B mount -t devtmpfs dev /dev
for module in /modules/*.ko; do
    $B insmod "$module" || echo "lab: insmod $module failed"
done
$B mkdir -p /lower /upper /new
$B mount -t ext4 -o ro,noatime /dev/vda /lower
$B mount -t tmpfs -o mode=755 upper /upper
$B mkdir /upper/up /upper/work
$B mount -t overlay -o lowerdir=/lower,upperdir=/upper/up,workdir=/upper/work root /new
modules=/new/usr/lib/modules
$B mkdir -p $modules /new/opt/pyvhostvdpa
$B mount -t ext4 -o ro,noatime /dev/vdb $modules
[ ! -b /dev/vdc ] || $B mount -t ext4 -o ro,noatime /dev/vdc /new/opt/pyvhostvdpa
$B mount -t tmpfs -o mode=755 run /new/run
$B cp -r /lab /new/run/lab
$B mount --move /proc /new/proc
$B mount --move /dev /new/dev
exec $B switch_root /new /bin/sh /run/lab/main.sh
