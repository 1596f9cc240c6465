%% What takes files from peers and lends its own to them: a store, or a tier server of the writer's
%% host.
-record(borrower, {
    host :: module(),
    %% Not of a writer's, which has it for any tier server.
    name :: erllama_cache_host:tier_srv() | undefined,
    tier :: erllama_cache_host:tier() | undefined,
    root :: file:name_all() | undefined,
    path :: erllama_cache_nif:root() | undefined,
    secret :: none | erllama_cache_nif:secret(),
    %% Who is in its group, and which process is its own member.
    group :: erllama_cache_peer_group:group() | undefined,
    server :: pid() | undefined,
    %% Milliseconds to wait for the others' answers.
    timeout = 0 :: non_neg_integer(),
    transport = tcp :: tcp | tls | distribution,
    %% The fetches that run, and the nodes that are not asked for now.
    flights :: ets:table() | undefined
}).
