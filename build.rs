//! Links librbd and librados, holds our declarations of their functions against their headers, and builds the one
//! thing that librados offers in C++ only.

fn main() {
    println!("cargo:rerun-if-changed=src/ceph/abi.c");
    println!("cargo:rerun-if-changed=src/ceph/copy_from.cc");
    cc::Build::new()
        .file("src/ceph/abi.c")
        .flag("-Werror")
        .flag("-Wno-deprecated-declarations")
        .compile("rbd_offload_abi");
    cc::Build::new()
        .cpp(true)
        .std("c++17")
        .file("src/ceph/copy_from.cc")
        .flag("-Wno-deprecated-declarations")
        .compile("rbd_offload_copy_from");
    println!("cargo:rustc-link-lib=rbd");
    println!("cargo:rustc-link-lib=rados");
}
