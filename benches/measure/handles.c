/* What a program costs that only opens what an idle daemon has open: librados clients, and the pools with each of them,
   with librbd loaded. Arguments: ceph.conf, the name of the user, the number of clients, pools. Prints a line, then
   waits for the end of its input. */
#include <rados/librados.h>
#include <rbd/librbd.h>
#include <stdio.h>
#include <stdlib.h>

int main(int count, char **arguments) {
  rados_t cluster;
  rados_ioctx_t pool;
  int major, minor, extra;
  rbd_version(&major, &minor, &extra);
  if (count < 4) return 1;
  for (int client = atoi(arguments[3]); client > 0; client--) {
    if (rados_create(&cluster, arguments[2]) < 0 || rados_conf_read_file(cluster, arguments[1]) < 0 ||
        rados_connect(cluster) < 0)
      return 1;
    for (int i = 4; i < count; i++)
      if (rados_ioctx_create(cluster, arguments[i], &pool) < 0) return 1;
  }
  puts("ready");
  fflush(stdout);
  while (getchar() != EOF) {
  }
  return 0;
}
