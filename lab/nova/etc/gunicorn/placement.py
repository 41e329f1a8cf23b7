wsgi_app = "placement.wsgi.api:application"
bind = "127.0.0.1:@PORT_PLACEMENT@"
workers = 1
threads = 4
timeout = 600
accesslog = "@DIR@/log/placement-access.log"
control_socket_disable = True
raw_env = ["OS_PLACEMENT_CONFIG_DIR=@DIR@/etc/placement"]
