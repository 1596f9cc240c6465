%% Files between stores over TLS, with the certificates of Erlang's distribution.
-module(erllama_cache_peer_tls_SUITE).

-include_lib("common_test/include/ct.hrl").
-include_lib("public_key/include/public_key.hrl").
-include_lib("stdlib/include/assert.hrl").

-export([all/0, init_per_suite/1, end_per_suite/1]).
-export([beside_plain_distribution/1, beside_distribution_over_tls/1,
         who_has_no_certificate_gets_no_file/1, another_authoritys_certificate_is_refused/1,
         another_hosts_certificate_is_refused/1, without_certificates_it_is_no_option/1,
         in_the_clear_nothing_is_lent/1, what_verifies_by_a_function_is_asked/1]).
-export([verify/3]).

-import(erllama_cache_test_util, [eventually/1]).

-define(STORE, tls_store).
-define(GROUP, tls_group).
-define(WRITER, erllama_cache_writer).

all() ->
    [beside_plain_distribution, beside_distribution_over_tls, who_has_no_certificate_gets_no_file,
     another_authoritys_certificate_is_refused, another_hosts_certificate_is_refused,
     without_certificates_it_is_no_option, in_the_clear_nothing_is_lent,
     what_verifies_by_a_function_is_asked].

init_per_suite(Config) ->
    {ok, _} = application:ensure_all_started(ssl),
    %% It knows the names of the nodes.
    ok = erllama_cache_nodes_util:distribute(?MODULE),
    [_, Host] = string:split(atom_to_list(node()), "@"),
    [Ours, Theirs] = [authority(Name) || Name <- ["ours", "theirs"]],
    [
        {good, optfile("good", Ours, Host, Config)},
        {foreign, optfile("foreign", Theirs, Host, Config)},
        {misnamed, optfile("misnamed", Ours, "elsewhere", Config)}
        | Config
    ].

end_per_suite(_Config) ->
    ok.

%% Of strengths that each OTP accepts.
strengths() ->
    [{key, {namedCurve, secp256r1}}, {digest, sha256}].

authority(Name) ->
    public_key:pkix_test_root_cert(Name, strengths()).

%% A file for -ssl_dist_optfile: a certificate of this authority for this host. No other authority's
%% are accepted.
optfile(Name, Authority, Host, Config) ->
    San = #'Extension'{
        extnID = ?'id-ce-subjectAltName', extnValue = [{dNSName, Host}], critical = false
    },
    Chain = #{
        root => Authority, intermediates => [], peer => [{extensions, [San]} | strengths()]
    },
    #{server_config := Server, client_config := Client} =
        public_key:pkix_test_data(#{server_chain => Chain, client_chain => Chain}),
    File = filename:join(?config(priv_dir, Config), Name ++ ".conf"),
    Options = [
        {server, [{verify, verify_peer}, {fail_if_no_peer_cert, true} | Server]},
        {client, [{verify, verify_peer} | Client]}
    ],
    ok = file:write_file(File, io_lib:format("~p.~n", [Options])),
    File.

beside_plain_distribution(Config) ->
    Args = ["-ssl_dist_optfile", ?config(good, Config)],
    between(Args, Args, Config, fun fetches_all/2).

beside_distribution_over_tls(Config) ->
    Args = ["-proto_dist", "inet_tls", "-ssl_dist_optfile", ?config(good, Config)],
    between(Args, Args, Config, fun fetches_all/2).

fetches_all(A, B) ->
    [
        begin
            Payload = rand:bytes(Size),
            Key = save(A, N, Payload),
            ?assertMatch({ok, _, Payload}, load(B, Key))
        end
     || {N, Size} <- [{1, 0}, {2, 1}, {3, 262144}, {4, (3 bsl 20) + 1}]
    ],
    ?assertMatch(#{fetched := 4, fetch_failures := 0}, info(B)).

%% The ticket alone does not do, nor does a port that anybody can reach.
who_has_no_certificate_gets_no_file(Config) ->
    Args = ["-ssl_dist_optfile", ?config(good, Config)],
    between(Args, Args, Config, fun(A, _B) ->
        Key = save(A, 1, <<"payload">>),
        Ticket = rand:bytes(32),
        Borrower = call(A, erlang, whereis, [?STORE]),
        Offer = [tls, ?STORE, Key, Ticket, Borrower],
        {ok, _Size, Address, Port} = call(A, erllama_cache_lend, offer, Offer),
        {ok, Plain} = gen_tcp:connect(Address, Port, [binary, {active, false}]),
        ok = gen_tcp:send(Plain, Ticket),
        %% An alert, or nothing, and the end.
        ?assertNotMatch({ok, _}, gen_tcp:recv(Plain, 1000, 5000))
    end).

another_authoritys_certificate_is_refused(Config) ->
    refused(?config(foreign, Config), Config).

another_hosts_certificate_is_refused(Config) ->
    refused(?config(misnamed, Config), Config).

refused(OptFile, Config) ->
    Lender = ["-ssl_dist_optfile", OptFile],
    Borrower = ["-ssl_dist_optfile", ?config(good, Config)],
    between(Lender, Borrower, Config, fun(A, B) ->
        Key = save(A, 1, <<"payload">>),
        ?assertEqual(miss, load(B, Key)),
        ?assertMatch(#{fetched := 0, fetch_failures := 1, files := 0}, info(B))
    end).

without_certificates_it_is_no_option(Config) ->
    Root = ?config(priv_dir, Config),
    ?assertError({invalid_option, peer_transport, tls},
                 erllama_cache_store:start_link(?STORE, #{root => Root, peer_transport => tls})).

%% Whatever a peer asks for.
in_the_clear_nothing_is_lent(Config) ->
    Args = ["-ssl_dist_optfile", ?config(good, Config)],
    between(Args, Args, Config, fun(A, _B) ->
        Key = save(A, 1, <<"payload">>),
        Borrower = call(A, erlang, whereis, [?STORE]),
        Offer = [tcp, ?STORE, Key, rand:bytes(32), Borrower],
        ?assertEqual({error, transport}, call(A, erllama_cache_lend, offer, Offer)),
        Pieces = [?STORE, Key, Borrower],
        ?assertEqual({error, transport}, call(A, erllama_cache_lend, offer_pieces, Pieces))
    end).

%% As such a file names it.
what_verifies_by_a_function_is_asked(Config) ->
    {ok, [[{server, Server}, {client, Client}]]} = file:consult(?config(good, Config)),
    File = filename:join(?config(priv_dir, Config), "verified.conf"),
    Options = [{server, Server}, {client, [{verify_fun, {?MODULE, verify, refuse}} | Client]}],
    ok = file:write_file(File, io_lib:format("~p.~n", [Options])),
    Lender = ["-ssl_dist_optfile", ?config(good, Config)],
    between(Lender, ["-ssl_dist_optfile", File], Config, fun(A, B) ->
        Key = save(A, 1, <<"payload">>),
        ?assertEqual(miss, load(B, Key)),
        ?assertMatch(#{fetch_failures := 1}, info(B))
    end).

verify(_Certificate, {bad_cert, Reason}, _State) -> {fail, Reason};
verify(_Certificate, {extension, _}, State) -> {unknown, State};
verify(_Certificate, _Valid, refuse) -> {fail, refused}.

%%% Two nodes, with a store each

between(ArgsA, ArgsB, Config, Fun) ->
    {A, NodeA} = erllama_cache_nodes_util:start_apart(ArgsA),
    {B, NodeB} = erllama_cache_nodes_util:start_apart(ArgsB),
    try
        ok = start_store(A, NodeA, Config),
        ok = start_store(B, NodeB, Config),
        true = call(A, net_kernel, connect_node, [NodeB]),
        eventually(fun() ->
            [2, 2] =:= [
                length(call(Peer, pg, get_members, [erllama_cache_peers, {stores, ?GROUP}]))
             || Peer <- [A, B]
            ]
        end),
        Fun(A, B)
    after
        [erllama_cache_nodes_util:stop({Peer, Node}) || {Peer, Node} <- [{A, NodeA}, {B, NodeB}]]
    end.

start_store(Peer, Node, Config) ->
    Root = filename:join(?config(priv_dir, Config), atom_to_list(Node)),
    ok = file:make_dir(Root),
    {ok, _} = call(Peer, application, ensure_all_started, [erllama_cache_nif]),
    Children = [
        erllama_cache_store:child_spec(?STORE, #{
            root => Root, peers => ?GROUP, peer_timeout => 5000
        }),
        #{id => writer, start => {?WRITER, start_link, [#{host => erllama_cache_store}]}}
    ],
    [{ok, _} = call(Peer, supervisor, start_child, [erllama_cache_nif_sup, with_tls(Child)])
     || Child <- Children],
    ok.

%% Only that node has the certificates without which it is no option.
with_tls(#{start := {erllama_cache_store, start_link, [Name, Options]}} = Child) ->
    Child#{start := {erllama_cache_store, start_link, [Name, Options#{peer_transport => tls}]}};
with_tls(Child) ->
    Child.

call(Peer, Module, Function, Args) ->
    peer:call(Peer, Module, Function, Args, 20000).

save(Peer, N, Payload) ->
    Meta = erllama_cache_test_util:meta([N]),
    {ok, Key} = call(Peer, ?WRITER, save, [?STORE, disk, Meta, Payload]),
    Key.

load(Peer, Key) ->
    call(Peer, erllama_cache_store, load, [?STORE, Key]).

info(Peer) ->
    call(Peer, erllama_cache_store, info, [?STORE]).
