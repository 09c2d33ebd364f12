#!/bin/bash
# The first process of a machine for tests: prepares a file system, and becomes systemd.
#
#   unshare --mount --pid --cgroup --fork ... begin.sh SOURCE ENVIRONMENT UNITS CACHE
#
# It runs in namespaces of its own, so nothing that it mounts is seen outside. The machine has the
# directories of this one, read-only or as copies, and none of its units.

set -euo pipefail
source=$1 environment=$2 units=$3 cache=$4

mount --make-rprivate /
mount -t proc proc /proc
mount -t tmpfs tmpfs /mnt
mkdir /mnt/source /mnt/environment /mnt/units /mnt/cache /mnt/etc /mnt/etc-work
mount --bind "$source" /mnt/source
mount --bind "$environment" /mnt/environment
cp -r "$units/." /mnt/units
if [[ -d "$cache" ]]; then
    cp -r "$cache/." /mnt/cache
fi
mount -t overlay overlay -o lowerdir=/etc,upperdir=/mnt/etc,workdir=/mnt/etc-work /etc
for directory in /run /tmp /var/lib /var/cache /var/log /var/tmp; do
    mount -t tmpfs -o mode=755 tmpfs "$directory"
done
chmod 1777 /tmp /var/tmp

umount --recursive /sys/fs/cgroup
mount -t cgroup2 cgroup2 /sys/fs/cgroup
mount --bind /proc/sys /proc/sys
mount -o remount,ro,bind /proc/sys

# Compiled kernels, so that they are not compiled again. systemd gives them to the unit's user.
mkdir -m 700 /var/cache/private
mkdir /var/cache/private/tokasaurus
mv /mnt/cache /var/cache/private/tokasaurus/tokasaurus
mkdir -p /etc/tokasaurus

# systemd leaves this to the machine's manager where it runs in a container.
mount --make-rshared /
export SYSTEMD_UNIT_PATH=/mnt/units container=tests
exec /lib/systemd/systemd --system --unit=multi-user.target --log-target=console \
    --log-level=info --show-status=no < /dev/null
