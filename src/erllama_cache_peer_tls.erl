%% TLS for files between peers, with the certificates that Erlang's distribution has: those of the
%% file that `-ssl_dist_optfile' names.
%%
%% @private
-module(erllama_cache_peer_tls).

-include_lib("kernel/include/net_address.hrl").

-export([is_configured/0, accept/2, connect/3, address_towards/1]).

%% Whether this node was started with that file, and it has options for both sides.
-spec is_configured() -> boolean().
is_configured() ->
    is_list(options(server)) andalso is_list(options(client)).

%% Makes an accepted connection one of TLS.
-spec accept(gen_tcp:socket(), timeout()) -> {ok, ssl:sslsocket()} | {error, term()}.
accept(Socket, Timeout) ->
    case options(server) of
        none -> {error, no_certificates};
        Options -> ssl:handshake(Socket, Options, Timeout)
    end.

%% The same on the other side. The certificate has to be of the host that the node's name has,
%% unless the options name another one, as distribution asks for it.
-spec connect(gen_tcp:socket(), node(), timeout()) -> {ok, ssl:sslsocket()} | {error, term()}.
connect(Socket, Node, Timeout) ->
    case options(client) of
        none ->
            {error, no_certificates};
        Options ->
            [_, Host] = string:split(atom_to_list(Node), "@"),
            Named = case lists:keymember(server_name_indication, 1, Options) of
                true -> Options;
                false -> [{server_name_indication, Host} | Options]
            end,
            ssl:connect(Socket, Named, Timeout)
    end.

%% Read each time: certificates are renewed while a node runs.
options(Role) ->
    case init:get_argument(ssl_dist_optfile) of
        {ok, [[File] | _]} ->
            case file:consult(File) of
                {ok, [Roles]} when is_list(Roles) ->
                    {ok, _} = application:ensure_all_started(ssl),
                    as_ssl_has_them(proplists:get_value(Role, Roles, none));
                _ ->
                    none
            end;
        _ ->
            none
    end.

%% Of the options, those that mean something to distribution alone are converted, or left out;
%% without what verifies a peer there is no connection.
as_ssl_has_them(Options) when is_list(Options) ->
    case proplists:get_value(verify_fun, Options) of
        {inet_tls_dist, _, _} -> none;
        {Fun, _} when is_function(Fun) ->
            case erlang:fun_info(Fun, module) of
                {module, inet_tls_dist} -> none;
                _ -> proplists:delete(ktls, Options)
            end;
        {Module, Function, State} ->
            Fun = {verify_fun, {fun Module:Function/3, State}},
            lists:keystore(verify_fun, 1, proplists:delete(ktls, Options), Fun);
        undefined ->
            proplists:delete(ktls, Options)
    end;
as_ssl_has_them(_None) ->
    none.

%% This machine's address on the way to that node, whatever carries distribution: that of a socket
%% which is connected with it, by which nothing is sent.
-spec address_towards(node()) -> {ok, inet:ip_address()} | {error, term()}.
address_towards(Node) ->
    case net_kernel:node_info(Node, address) of
        {ok, #net_address{address = {Theirs, Port}}} -> local_address(Theirs, Port);
        _ -> {error, no_address}
    end.

local_address(Theirs, Port) ->
    Family = case Theirs of {_, _, _, _} -> inet; _ -> inet6 end,
    case gen_udp:open(0, [Family]) of
        {ok, Socket} ->
            try
                ok = gen_udp:connect(Socket, Theirs, Port),
                {ok, {Ours, _}} = inet:sockname(Socket),
                {ok, Ours}
            catch
                error:{badmatch, {error, _} = Error} -> Error
            after
                gen_udp:close(Socket)
            end;
        {error, _} = Error ->
            Error
    end.
