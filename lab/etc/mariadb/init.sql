create database if not exists keystone;
create database if not exists glance;
create database if not exists cinder;
create user if not exists 'keystone'@'127.0.0.1' identified by 'secret';
create user if not exists 'glance'@'127.0.0.1' identified by 'secret';
create user if not exists 'cinder'@'127.0.0.1' identified by 'secret';
grant all on keystone.* to 'keystone'@'127.0.0.1';
grant all on glance.* to 'glance'@'127.0.0.1';
grant all on cinder.* to 'cinder'@'127.0.0.1';
