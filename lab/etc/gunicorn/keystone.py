wsgi_app = "keystone.wsgi.api:application"
bind = "127.0.0.1:@PORT_KEYSTONE@"
workers = 2
threads = 4
timeout = 600
accesslog = "@DIR@/log/keystone-access.log"
control_socket_disable = True
raw_env = ["OS_KEYSTONE_CONFIG_DIR=@DIR@/etc/keystone"]
