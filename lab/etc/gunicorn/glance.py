wsgi_app = "glance.wsgi.api:application"
bind = "127.0.0.1:@PORT_GLANCE@"
workers = 2
threads = 8
timeout = 600
accesslog = "@DIR@/log/glance-access.log"
control_socket_disable = True
raw_env = ["OS_GLANCE_CONFIG_DIR=@DIR@/etc/glance"]
