%% @doc Loads saved states from any host, in the calling process.
%%
%% A load runs on dirty schedulers, a slice at a time, beside any number of others, and every byte
%% is checked by the strongest check that the file has. Inside erllama it takes the place of
%% `erllama_cache_disk_srv:load/2', which reads one file after the other in one process.
%%
%% While a save of the key is pending behind its caller on this node, a load returns that save's
%% payload from memory, at once and without a copy.
-module(erllama_cache_reader).

-export([load/2, load/3, fetch/2, fetch/3]).
-export_type([options/0]).

-include("erllama_cache_limits.hrl").

-type options() :: #{timeout => timeout(), wait => timeout()}.
%% <ul>
%% <li>`timeout': milliseconds after which a load gives up (default: `infinity');</li>
%% <li>`wait': for a caller that wants what is on the disk, and no payload from memory: milliseconds
%%   to wait for a pending save of the key.</li>
%% </ul>

%% @doc Loads as {@link load/3}, however long it takes.
%%
%% ```
%% {ok, #{tokens := Tokens}, Payload} = erllama_cache_reader:load(my_store, Key).
%% '''
-spec load(erllama_cache_host:tier_srv(), erllama_cache_writer:key()) ->
    {ok, erllama_cache_store:file_info(), Payload :: binary()} | miss | {error, term()}.
load(TierSrv, Key) ->
    load(TierSrv, Key, #{}).

%% @doc Loads the state that is stored under a key: from the store of this name, or else from the
%% tier server of this name by the writer's host.
%%
%% ```
%% {ok, _Info, Payload} = erllama_cache_reader:load(my_store, Key, #{timeout => 2000}).
%% '''
%%
%% Errors: `timeout', also of `wait'; `{corrupt, Reason}', and inside erllama the file is removed,
%% as erllama does; `unauthenticated', the writer has a secret and the file was made without it;
%% `tier_busy', the tier server did not answer; `enomem'; a POSIX reason. Exits with `{noproc, _}'
%% when there is neither a store nor a tier server of that name, or no writer has been started.
-spec load(erllama_cache_host:tier_srv(), erllama_cache_writer:key(), options()) ->
    {ok, erllama_cache_store:file_info(), Payload :: binary()} | miss | {error, term()}.
load(TierSrv, Key, Options) when
    is_atom(TierSrv), is_binary(Key), byte_size(Key) =:= 32, is_map(Options)
->
    #{timeout := Timeout, wait := Wait} =
        erllama_cache_config:load_options(Options, #{timeout => infinity, wait => none}),
    case erllama_cache_store_lookup:keyed_by(TierSrv) of
        {ok, _KeyedBy} when Wait =:= none -> erllama_cache_store:load(TierSrv, Key, Timeout);
        {ok, _KeyedBy} ->
            told(TierSrv, Key, fun() ->
                load_after(Wait, erllama_cache_store, TierSrv, Key, Timeout)
            end);
        error ->
            told(TierSrv, Key, fun() -> load_by_host(Wait, TierSrv, Key, Timeout) end)
    end.

told(TierSrv, Key, Load) ->
    erllama_cache_telemetry:span(load, #{name => TierSrv, key => Key},
                                 {Load, fun erllama_cache_load:described/1}).

%% @doc Fetches as {@link fetch/3}, into a tier `disk', however long it takes.
%%
%% ```
%% miss = erllama_cache_reader:fetch(my_store, <<1:256>>).
%% '''
-spec fetch(erllama_cache_host:tier_srv(), erllama_cache_writer:key()) ->
    ok | miss | {error, term()}.
fetch(TierSrv, Key) ->
    fetch(TierSrv, Key, #{}).

%% @doc Takes the file of a key from another node that has it: into the store of this name, or else
%% into the root of the tier server of this name, which has the same name on the other nodes. `ok'
%% when it is on this node's disk and checked, and the store or the host knows of it. `miss' when no
%% node has it, or none that has it could send it; see {@link erllama_cache_peers}.
%%
%% ```
%% miss = erllama_cache_reader:fetch(my_store, <<1:256>>, #{timeout => 2000}).
%% '''
%%
%% The host sees a save: its key is reserved while it comes, and announced. So whoever asks the host
%% for it meanwhile waits for it as for a save. Options: `timeout', milliseconds after which the
%% caller goes on without it (default: `infinity'), while it may still arrive; `tier', of the tier
%% server (default: `disk').
%%
%% Errors: `timeout'; those of a reservation, such as `conflict', when a save of the key runs;
%% `expired', the file is on the disk, but the reservation was lost, and the host may not know of
%% it; `tier_busy'; `{fetch_died, Reason}', the host has raised; a POSIX reason. Exits with
%% `{noproc, _}' when there is neither a store nor a tier server of that name, or no writer has
%% been started.
-spec fetch(erllama_cache_host:tier_srv(), erllama_cache_writer:key(),
            #{timeout => timeout(), tier => erllama_cache_host:tier()}) ->
    ok | miss | {error, term()}.
fetch(TierSrv, Key, Options) when
    is_atom(TierSrv), is_binary(Key), byte_size(Key) =:= 32, is_map(Options)
->
    #{timeout := Timeout, tier := Tier} =
        erllama_cache_config:load_options(Options, #{timeout => infinity, tier => disk}),
    Borrower = case erllama_cache_store_lookup:borrower(TierSrv) of
        error -> erllama_cache_peer_tier:borrower(TierSrv, Tier);
        Found -> Found
    end,
    case Borrower of
        {ok, Whose} -> erllama_cache_peers:fetch_file(Whose, Key, Timeout);
        {error, _} = Error -> Error
    end.

load_by_host(Wait, TierSrv, Key, Timeout) ->
    #{host := Host} = erllama_cache_setup:get(?MODULE, load, [TierSrv, Key]),
    case Wait of
        none ->
            case erllama_cache_pending:find(erllama_cache_pending:scope(Host, TierSrv), Key) of
                {ok, Info, Payload, _Owner} -> {ok, Info, Payload};
                none -> load_file(Host, TierSrv, Key, Timeout)
            end;
        _ ->
            load_after(Wait, Host, TierSrv, Key, Timeout)
    end.

%% Loads what is on the disk when no save of the key is pending.
load_after(Wait, Host, TierSrv, Key, Timeout) ->
    case erllama_cache_pending:find(erllama_cache_pending:scope(Host, TierSrv), Key) of
        {ok, _Info, _Payload, Owner} ->
            Monitor = monitor(process, Owner),
            receive
                {'DOWN', Monitor, process, Owner, _} -> load_file(Host, TierSrv, Key, Timeout)
            after Wait ->
                true = demonitor(Monitor, [flush]),
                {error, timeout}
            end;
        none ->
            load_file(Host, TierSrv, Key, Timeout)
    end.

load_file(erllama_cache_store, Store, Key, Timeout) ->
    erllama_cache_store_load:load_file(Store, Key, Timeout);
load_file(Host, TierSrv, Key, Timeout) ->
    #{secret := Secret} = erllama_cache_setup:get(?MODULE, load, [TierSrv, Key]),
    case erllama_cache_host:locate(Host, TierSrv) of
        {ok, _Root, Path} ->
            Result = erllama_cache_load:run(Path, Key, Secret, Timeout),
            ok = after_load(Result, Host, TierSrv, Path, Key, Secret),
            Result;
        {error, _} = Error ->
            Error
    end.

after_load({error, {corrupt, _}}, Host, TierSrv, Path, Key, Secret) ->
    case erlang:function_exported(Host, corrupt, 2) of
        true ->
            %% A save may have replaced the file since: only what is corrupt still is removed.
            case erllama_cache_load:remove_corrupt(Path, Key, Secret) of
                true -> Host:corrupt(TierSrv, Key);
                _ -> ok
            end;
        false ->
            ok
    end;
after_load(_Result, _Host, _TierSrv, _Path, _Key, _Secret) ->
    ok.
