//! The command line as its users meet it: what it prints, where, and with which exit status.

mod compare;
mod control;
mod convert;
mod create;
mod damage;
mod disk_full;
mod host_devices;
mod io;
mod iotests;
mod map;
mod qcow2_check;
mod qcow2_create;
mod qcow2_info;
mod qcow2_resize;
mod qcow2_snapshot;
mod qemu_img;
mod qemu_io;
mod rebase;
mod scale;
mod serve;
mod support;
mod zns;
mod zones;
