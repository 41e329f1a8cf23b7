# RabbitMQ, with an epmd of its own. Its users are in etc/rabbit/definitions.json, which it loads at every start.
# shellcheck shell=bash

# RabbitMQ's scripts are told everything by the environment. To be called in a subshell.
rabbit_environment() {
  export HOME=$DIR/rabbit
  export RABBITMQ_NODENAME=rbdlab$BASE@localhost
  export RABBITMQ_NODE_IP_ADDRESS=127.0.0.1
  export RABBITMQ_NODE_PORT=$PORT_RABBIT
  export RABBITMQ_DIST_PORT=$PORT_RABBIT_DIST
  export RABBITMQ_SERVER_ADDITIONAL_ERL_ARGS='-kernel inet_dist_use_interface {127,0,0,1}'
  export RABBITMQ_CONF_ENV_FILE=$DIR/etc/rabbit/env.conf
  export RABBITMQ_CONFIG_FILE=$DIR/etc/rabbit/rabbitmq
  export RABBITMQ_ENABLED_PLUGINS_FILE=$DIR/etc/rabbit/enabled_plugins
  export RABBITMQ_MNESIA_BASE=$DIR/rabbit/mnesia
  export RABBITMQ_LOG_BASE=$DIR/rabbit/log
  export ERL_EPMD_ADDRESS=127.0.0.1
  export ERL_EPMD_PORT=$PORT_EPMD
}

# RUNNING_UNDER_SYSTEMD: the start script then becomes the broker instead of its parent, so that the pid is the broker's.
launch_rabbit() (
  rabbit_environment
  mkdir -p "$DIR/rabbit"
  alive epmd || launch epmd epmd
  RUNNING_UNDER_SYSTEMD=1 launch rabbit /usr/lib/rabbitmq/bin/rabbitmq-server
)

# The listener is the last thing that the broker starts.
ready_rabbit() { listening "$PORT_RABBIT"; }

logs_rabbit() { printf '%s\n' "$DIR/log/rabbit.out" "$DIR/rabbit/log/rbdlab$BASE@localhost.log"; }

rabbitctl() (
  rabbit_environment
  timeout 60 /usr/lib/rabbitmq/bin/rabbitmqctl -q "$@"
)
