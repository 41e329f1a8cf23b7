//! Links librbd and librados, and holds our declarations of their functions against their headers.

fn main() {
    println!("cargo:rerun-if-changed=src/ceph/abi.c");
    println!("cargo:rustc-link-lib=rbd");
    println!("cargo:rustc-link-lib=rados");
    cc::Build::new()
        .file("src/ceph/abi.c")
        .flag("-Werror")
        .flag("-Wno-deprecated-declarations")
        .compile("rbd_offload_abi");
}
