wsgi_app = "nova.wsgi.osapi_compute:application"
bind = "127.0.0.1:@PORT_NOVA@"
workers = 1
threads = 8
timeout = 600
accesslog = "@DIR@/log/nova-api-access.log"
control_socket_disable = True
raw_env = ["OS_NOVA_CONFIG_DIR=@DIR@/etc/nova"]
