wsgi_app = "cinder.wsgi.api:application"
bind = "127.0.0.1:@PORT_CINDER@"
workers = 1
threads = 8
timeout = 600
accesslog = "@DIR@/log/cinder-api-access.log"
control_socket_disable = True
