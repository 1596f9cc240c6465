%% What the fakes of the host application's modules share: a log of the calls that reach them,
%% and a script of what the next ones do.
%%
%% A call without a step in the script does what the host does. Everything runs in the calling
%% process, as the host's own functions do: a step that blocks, blocks the caller.
%%
%% There are two kinds of host. The fakes are compiled as the token-keyed one (erllama 0.5), with
%% TEXT_KEYED defined as the text-keyed one (0.10 and later), and for an analysis that runs nothing
%% with BOTH_KINDS. erllama_cache_erllama_util:load_fakes/1 makes a node's fakes those of a kind.
-module(erllama_fake).
-behaviour(gen_server).

-export([keyed_by/0]).
-export([start/1, start/2, stop/0]).
-export([script/2, calls/0, forget_calls/0]).
-export([call/3, start_link/3]).
-export([init/1, handle_call/3, handle_cast/2]).
-export_type([name/0, step/0]).

-type name() :: make | make_text | quant_byte | encode_tokens | dir
              | reserve_save | check_reservation | mark_published | announce_saved
              | insert_available | cancel_reservation | incr.
%% The host's functions, whose names are unique without their modules.

-type step() :: {return, term()}
              | {raise, error | exit | throw, Reason :: term()}
              | {before, fun((Args :: list()) -> term())}
              | {instead, fun((Args :: list()) -> term())}.
%% `before' runs the fun and then does what the host does; `instead' gives what the fun returns.

-record(state, {
    tier_srv :: atom(),
    script = #{} :: #{name() => [step()]},
    calls = [] :: [{name(), Args :: list(), Caller :: pid()}]
}).

%% What the host that the fakes are makes keys of.
-spec keyed_by() -> tokens | text.
keyed_by() ->
    erllama_fake_kvc:keyed_by().

%% Starts the host's servers, with one tier server of this name and root.
-spec start(atom(), file:name_all()) -> ok.
start(TierSrv, Root) ->
    ok = start(TierSrv),
    {ok, _} = erllama_cache_meta_srv:start(),
    {ok, _} = erllama_cache_disk_srv:start(TierSrv, Root),
    ok.

%% Starts what those need, which somebody else starts.
-spec start(atom()) -> ok.
start(TierSrv) ->
    {ok, _} = gen_server:start({local, ?MODULE}, ?MODULE, TierSrv, []),
    ok = erllama_cache_counters:reset(),
    erllama_cache_key:reset().

%% Stops those of them that still run.
-spec stop() -> ok.
stop() ->
    TierSrv = gen_server:call(?MODULE, tier_srv),
    Servers = [TierSrv, erllama_cache_meta_srv, ?MODULE],
    lists:foreach(fun gen_server:stop/1, [S || S <- Servers, whereis(S) =/= undefined]).

%% What the next calls of this function do, one step for each.
-spec script(name(), [step()]) -> ok.
script(Name, Steps) ->
    gen_server:call(?MODULE, {script, Name, Steps}).

%% The calls so far, the first one first.
-spec calls() -> [{name(), Args :: list(), Caller :: pid()}].
calls() ->
    gen_server:call(?MODULE, calls).

-spec forget_calls() -> ok.
forget_calls() ->
    gen_server:call(?MODULE, forget_calls).

%% For the fakes: logs a call and answers it. `Host' does what the host does.
-spec call(name(), list(), fun(() -> Answer)) -> Answer.
call(Name, Args, Host) ->
    case gen_server:call(?MODULE, {called, Name, Args}) of
        host -> Host();
        {return, Answer} -> Answer;
        {raise, Class, Reason} -> erlang:raise(Class, Reason, []);
        {before, Fun} -> _ = Fun(Args), Host();
        {instead, Fun} -> Fun(Args)
    end.

%% For the fakes: starts a server below a supervisor. If that is new because the one before was
%% killed, the server of before has its exit signal, but perhaps not yet handled it.
-spec start_link(atom(), module(), term()) -> {ok, pid()} | {error, term()}.
start_link(Name, Module, Arg) ->
    case gen_server:start_link({local, Name}, Module, Arg, []) of
        {error, {already_started, Pid}} = Error ->
            Monitor = monitor(process, Pid),
            receive
                {'DOWN', Monitor, process, Pid, _} -> start_link(Name, Module, Arg)
            after 1000 ->
                Error
            end;
        Started ->
            Started
    end.

init(TierSrv) ->
    {ok, #state{tier_srv = TierSrv}}.

handle_call({called, Name, Args}, {Caller, _}, #state{script = Script, calls = Calls} = State) ->
    Logged = State#state{calls = [{Name, Args, Caller} | Calls]},
    case Script of
        #{Name := [Step | Steps]} ->
            {reply, Step, Logged#state{script = Script#{Name := Steps}}};
        _ ->
            {reply, host, Logged}
    end;
handle_call({script, Name, Steps}, _From, #state{script = Script} = State) ->
    {reply, ok, State#state{script = Script#{Name => Steps}}};
handle_call(calls, _From, #state{calls = Calls} = State) ->
    {reply, lists:reverse(Calls), State};
handle_call(forget_calls, _From, State) ->
    {reply, ok, State#state{calls = []}};
handle_call(tier_srv, _From, #state{tier_srv = TierSrv} = State) ->
    {reply, TierSrv, State}.

handle_cast(_Request, State) ->
    {noreply, State}.
