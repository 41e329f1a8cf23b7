wsgi_app = "glance.wsgi.api:application"
bind = "127.0.0.1:@PORT_GLANCE_DIRECT@"
workers = 1
threads = 8
timeout = 600
accesslog = "@DIR@/log/glance-direct-access.log"
control_socket_disable = True
raw_env = ["OS_GLANCE_CONFIG_DIR=@DIR@/etc/glance-direct"]
